"""LlamaIndex's OpenAILike against a running server.

check.py <url> <base model> <adapter>
"""

import sys
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict, Field

MESSAGES = [ChatMessage(role="system", content="Be brief."), ChatMessage("Hello!")]
ENDLESS = {"extra_body": {"ignore_eos": True}}
# Random weights would write spaces, texts and, where a schema allows any, fields without end. Their
# tokens are bytes: these biases leave out the spaces, and end the texts and objects.
TERSE = {"logit_bias": {"9": -100, "10": -100, "13": -100, "32": -100, "34": 100, "125": 90}}


class Answer(BaseModel):
    """What a customer wants. Random weights would add fields without end if they might."""

    model_config = ConfigDict(extra="forbid")

    is_good: bool
    count: Literal[1, 22, 333]
    words: list[Literal["ja", "nein"]] = Field(max_length=2)


def weather(city: Literal["Rome", "Oslo"]) -> str:
    """Forecast the weather."""
    return f"sun in {city}"


def model_of(url: str, name: str, **options) -> OpenAILike:
    fixed = {"api_base": url, "api_key": "none", "temperature": 0, "max_retries": 0}
    return OpenAILike(name, **{**fixed, "max_tokens": 12, "is_chat_model": True, **options})


def check_text(url: str, base: str, adapter: str) -> None:
    for is_chat_model in (True, False):
        texts = {}
        for name in (base, adapter):
            llm = model_of(url, name, is_chat_model=is_chat_model, additional_kwargs=ENDLESS)
            whole = llm.complete("Hello!")
            *_, last = llm.stream_complete("Hello!")
            assert whole.text and last.text == whole.text
            texts[name] = whole.text
            whole = llm.chat(MESSAGES)
            assert whole.raw.usage.completion_tokens == 12
            parts = list(llm.stream_chat(MESSAGES))
            assert parts[-1].message.content == whole.message.content
            assert "".join(part.delta or "" for part in parts) == whole.message.content
        assert texts[base] != texts[adapter], "the adapter must change what is said"


def check_structured(url: str, name: str) -> None:
    for is_calling in (True, False):
        llm = model_of(
            url,
            name,
            max_tokens=400,
            is_function_calling_model=is_calling,
            should_use_structured_outputs=not is_calling,
            additional_kwargs=TERSE,
        )
        answer = llm.structured_predict(Answer, PromptTemplate("Is it good?"))
        assert isinstance(answer, Answer), answer


def check_tools(url: str, name: str) -> None:
    llm = model_of(
        url, name, max_tokens=200, is_function_calling_model=True, additional_kwargs=TERSE
    )
    tool = FunctionTool.from_defaults(weather)
    answer = llm.chat_with_tools([tool], "What is the weather?", tool_required=True)
    [call, *_] = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "weather" and call.tool_kwargs["city"] in ("Rome", "Oslo")
    assert llm.predict_and_call([tool], "What is the weather?", tool_required=True).response


def main() -> None:
    url, base, adapter = f"{sys.argv[1]}/v1", *sys.argv[2:]
    check_text(url, base, adapter)
    for name in (base, adapter):
        check_structured(url, name)
        check_tools(url, name)


if __name__ == "__main__":
    main()
