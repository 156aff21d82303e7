"""LangChain's OpenAI classes against a running server.

check.py <url> <base model> <adapter>
"""

import math
import sys
from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, Field

ENDLESS = {"ignore_eos": True}  # random weights may end at once
# Random weights would write spaces, texts and, where a schema allows any, fields without end. Their
# tokens are bytes: these biases leave out the spaces, and end the texts and objects.
TERSE = {"9": -100, "10": -100, "13": -100, "32": -100, "34": 100, "125": 90}


class Answer(BaseModel):
    """What a customer wants. Random weights would add fields without end if they might."""

    model_config = ConfigDict(extra="forbid")

    is_good: bool
    count: Literal[1, 22, 333]
    words: list[Literal["ja", "nein"]] = Field(max_length=2)


@tool
def weather(city: Literal["Rome", "Oslo"], days: Literal[1, 2]) -> str:
    """Forecast the weather."""
    return f"sun in {city} for {days} days"


def chat(url: str, model: str, **options) -> ChatOpenAI:
    fixed = {"base_url": url, "api_key": "none", "temperature": 0, "max_retries": 0}
    return ChatOpenAI(model=model, **{**fixed, "max_tokens": 400, **options})


def check_chat(url: str, base: str, adapter: str) -> None:
    texts = {}
    for model in (base, adapter):
        llm = chat(url, model, max_tokens=12, extra_body=ENDLESS)
        messages = [SystemMessage("Be brief."), HumanMessage("Hello!", name="eve")]
        whole = llm.invoke(messages)
        assert whole.content and whole.usage_metadata["output_tokens"] == 12
        chunks = list(llm.stream(messages, stream_usage=True))
        assert "".join(chunk.content for chunk in chunks) == whole.content
        usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
        assert usages[-1]["output_tokens"] == 12
        batch = llm.batch([messages, messages])
        assert [each.content for each in batch] == [whole.content] * 2
        texts[model] = whole.content
    assert texts[base] != texts[adapter], "the adapter must change what is said"


def check_options(url: str, base: str) -> None:
    llm = chat(url, base, max_tokens=6, temperature=1, seed=3, n=2, stop=["\n\n"], top_p=0.9)
    texts = [
        [each.text for each in llm.generate([[HumanMessage("Hello!")]]).generations[0]]
        for _ in range(2)
    ]
    assert len(texts[0]) == 2 and texts[0] == texts[1], "a seed must give the same answers"
    answer = chat(url, base, max_tokens=3, logprobs=True, top_logprobs=2).invoke("Hello!")
    assert answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]


def check_completions(url: str, base: str, adapter: str) -> None:
    texts = {}
    for model in (base, adapter):
        llm = OpenAI(
            base_url=url,
            api_key="none",
            model=model,
            temperature=0,
            max_tokens=9,
            max_retries=0,
            extra_body=ENDLESS,
        )
        texts[model] = llm.invoke("one")
        assert texts[model] == "".join(llm.stream("one"))
        assert llm.batch(["one", "one"]) == [texts[model]] * 2
    assert texts[base] != texts[adapter]


def check_structured(url: str, model: str) -> None:
    llm = chat(url, model, logit_bias=TERSE)
    for method in ("json_schema", "function_calling"):
        answer = llm.with_structured_output(Answer, method=method).invoke("Is it good?")
        assert isinstance(answer, Answer), (method, answer)
        *_, last = llm.with_structured_output(Answer, method=method).stream("Is it good?")
        assert last == answer, (method, last, answer)
    # "json_mode" promises an object, of whatever form
    answer = llm.with_structured_output(None, method="json_mode").invoke("Answer in JSON.")
    assert isinstance(answer, dict), answer


def check_tools(url: str, model: str) -> None:
    for choice in ("any", "weather", True):
        llm = chat(url, model, logit_bias=TERSE).bind_tools([weather], tool_choice=choice)
        answer = llm.invoke("What is the weather?")
        assert answer.tool_calls and not answer.invalid_tool_calls, answer
        [call] = answer.tool_calls
        assert call["name"] == "weather" and call["id"]
        assert weather.invoke(call["args"]).startswith("sun in")  # validates them
        whole = None
        for chunk in llm.stream("What is the weather?"):
            whole = chunk if whole is None else whole + chunk
        assert [(c["name"], c["args"]) for c in whole.tool_calls] == [
            (c["name"], c["args"]) for c in answer.tool_calls
        ]
    num_tokens = [
        num_prompt_tokens(url, model, answer, result)
        for result in ("sun in Rome", "snow in Rome and in Oslo")
    ]
    assert num_tokens[0] < num_tokens[1], "the result of the tool must be in the prompt"


def num_prompt_tokens(url: str, model: str, call: AIMessage, result: str) -> int:
    history = [
        HumanMessage("What is the weather?"),
        AIMessage("", tool_calls=call.tool_calls),
        ToolMessage(result, tool_call_id=call.tool_calls[0]["id"]),
    ]
    llm = chat(url, model, max_tokens=5, extra_body=ENDLESS)
    answer = llm.bind_tools([weather], tool_choice="none").invoke(history)
    assert answer.content and answer.usage_metadata["output_tokens"] == 5
    return answer.usage_metadata["input_tokens"]


def check_embeddings(url: str, base: str, adapter: str) -> None:
    vectors = {}
    for model in (base, adapter):
        embeddings = OpenAIEmbeddings(
            base_url=url,
            api_key="none",
            model=model,
            max_retries=0,
            check_embedding_ctx_length=False,  # else tiktoken's token ids are sent
        )
        vectors[model], second = embeddings.embed_documents(["one", "two"])
        assert math.isclose(math.hypot(*second), 1, abs_tol=1e-3)
        one = embeddings.embed_query("one")
        assert all(
            math.isclose(a, b, abs_tol=1e-4) for a, b in zip(one, vectors[model], strict=True)
        )
        assert second != vectors[model]
    assert vectors[base] != vectors[adapter]


def main() -> None:
    url, base, adapter = f"{sys.argv[1]}/v1", *sys.argv[2:]
    check_chat(url, base, adapter)
    check_options(url, base)
    check_completions(url, base, adapter)
    for model in (base, adapter):
        check_structured(url, model)
        check_tools(url, model)
    check_embeddings(url, base, adapter)


if __name__ == "__main__":
    main()
