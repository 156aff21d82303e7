"""DSPy's programs against a running server.

check.py <url> <base model> <adapter>
"""

import os
import sys
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no download of prices

import dspy


class Judge(dspy.Signature):
    """Judge a text."""

    text: str = dspy.InputField()
    is_good: bool = dspy.OutputField()
    count: Literal[1, 22, 333] = dspy.OutputField()


def language_model(url: str, model: str, **options) -> dspy.LM:
    fixed = {"api_base": url, "api_key": "none", "cache": False, "num_retries": 0}
    return dspy.LM(f"openai/{model}", **fixed, temperature=0, max_tokens=400, **options)


def check_text(url: str, base: str, adapter: str) -> None:
    texts = {}
    for model in (base, adapter):
        lm = language_model(url, model, extra_body={"structured_outputs": {"regex": "[a-z ]{30}"}})
        texts[model] = lm("Hello!")[0]
        assert len(texts[model]) == 30, texts
        assert lm(messages=[{"role": "user", "content": "Hello!"}])[0] == texts[model]
        assert lm.history[-1]["usage"]["completion_tokens"] >= 30
    assert texts[base] != texts[adapter], "the adapter must change what is said"


def check_predict(url: str, model: str) -> None:
    """The adapters only ask for their forms: a grammar holds random weights to them."""
    json_form = r'\{"is_good": (true|false), "count": (1|22|333)\}'
    fields = r"\[\[ ## is_good ## \]\]\n(True|False)\n\n\[\[ ## count ## \]\]\n(1|22|333)\n\n"
    forms = (
        (dspy.JSONAdapter(), json_form),
        (dspy.ChatAdapter(), fields + r"\[\[ ## completed ## \]\]"),
    )
    for adapter, form in forms:
        lm = language_model(url, model, extra_body={"structured_outputs": {"regex": form}})
        with dspy.context(lm=lm, adapter=adapter):
            answer = dspy.Predict(Judge)(text="Hello!")
        assert isinstance(answer.is_good, bool) and answer.count in (1, 22, 333), answer


def main() -> None:
    url, base, adapter = f"{sys.argv[1]}/v1", *sys.argv[2:]
    check_text(url, base, adapter)
    for model in (base, adapter):
        check_predict(url, model)


if __name__ == "__main__":
    main()
