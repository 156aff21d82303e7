"""smolagents' model and agents against a running server.

check.py <url> <base model> <adapter>
"""

import json
import sys

from smolagents import CodeAgent, OpenAIModel, ToolCallingAgent, tool
from smolagents.models import ChatMessage, MessageRole

MESSAGES = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": "Hello!"}])]
ENDLESS = {"extra_body": {"ignore_eos": True}}
# Random weights would write spaces, texts and, where a schema allows any, fields without end. Their
# tokens are bytes: these biases leave out the spaces, and end the texts and objects.
TERSE = {"logit_bias": {"9": -100, "10": -100, "13": -100, "32": -100, "34": 100, "125": 90}}


@tool
def weather(city: str) -> str:
    """Forecast the weather.

    Args:
        city: where
    """
    return f"sun in {city}"


weather.inputs["city"]["enum"] = ["Rome", "Oslo"]


def model_of(url: str, name: str, **options) -> OpenAIModel:
    return OpenAIModel(name, api_base=url, api_key="none", temperature=0, **options)


def check_text(url: str, base: str, adapter: str) -> None:
    texts = {}
    for name in (base, adapter):
        model = model_of(url, name, max_tokens=12, **ENDLESS)
        whole = model.generate(MESSAGES)
        assert whole.content and whole.token_usage.output_tokens == 12
        parts = list(model.generate_stream(MESSAGES))
        assert "".join(part.content or "" for part in parts) == whole.content
        assert sum(part.token_usage.output_tokens for part in parts if part.token_usage) == 12
        texts[name] = whole.content
    assert texts[base] != texts[adapter], "the adapter must change what is said"


def check_tools(url: str, name: str) -> None:
    model = model_of(url, name, max_tokens=200, **TERSE)
    answer = model.generate(MESSAGES, tools_to_call_from=[weather])
    assert answer.tool_calls[0].function.name == "weather", answer
    assert model.parse_tool_calls(answer).tool_calls[0].function.arguments["city"] in (
        "Rome",
        "Oslo",
    )


def check_agents(url: str, name: str) -> None:
    """Run an agent of each kind. It may give up, but what it said before must have the form."""
    calling = ToolCallingAgent([weather], model_of(url, name, max_tokens=400, **TERSE), max_steps=2)
    calling.run("What is the weather?")
    first = calling.memory.get_full_steps()[1]
    assert first["tool_calls"][0]["function"]["name"] in ("weather", "final_answer"), first
    assert first["error"] is None and first["observations"], first
    coding = CodeAgent(
        [],
        model_of(url, name, max_tokens=300, **TERSE),
        max_steps=1,
        use_structured_outputs_internally=True,
    )
    coding.run("Count to three.")
    said = [step.model_output for step in coding.memory.steps if hasattr(step, "model_output")]
    assert json.loads(said[0]).keys() == {"thought", "code"}, said


def main() -> None:
    url, base, adapter = f"{sys.argv[1]}/v1", *sys.argv[2:]
    check_text(url, base, adapter)
    for name in (base, adapter):
        check_tools(url, name)
    check_agents(url, adapter)


if __name__ == "__main__":
    main()
