"""The official OpenAI client's responses against a server that says what it is told to.

    python tests/clients/responses_client.py <base url>

Ends with 0 if everything held.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any

import openai
from openai import OpenAI
from pydantic import BaseModel

CALL = '<tool_call>\n{"name": "stock_of", "arguments": {"item": "t\\"a", "n": 3}}\n</tool_call>'
PARAMETERS = {
    "type": "object",
    "properties": {"item": {"type": "string"}, "n": {"type": "integer"}},
}
TOOL = {"type": "function", "name": "stock_of", "parameters": PARAMETERS, "strict": False}


# Fields that OpenAI answers with, too, and this version of its client does not know
UNTYPED = ("store (Response)", "name (ResponseFunctionCallArgumentsDoneEvent)")


class Answer(BaseModel):
    is_good: bool


def said(text: str) -> dict[str, Any]:
    return {"role": "user", "content": f"SAY:{text}"}


def check_types(answer: BaseModel) -> None:
    """Compare a response or an event with the client's own types, which it does not do itself."""
    strict = type(answer).model_validate_json(answer.to_json(), strict=True)
    unknown = [each for each in unknown_fields(strict) if not each.endswith(UNTYPED)]
    assert unknown == [], unknown


def unknown_fields(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from (f"{path}.{name} ({type(value).__name__})" for name in value.model_extra or ())
        for name in value.model_fields_set:
            yield from unknown_fields(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for at, each in enumerate(value):
            yield from unknown_fields(each, f"{path}[{at}]")


def check_items(client: OpenAI) -> None:
    turns: list[Any] = [said(f"<think>Hm.</think>Let me see.\n{CALL}")]
    asked: dict[str, Any] = {"model": "base", "tools": [TOOL], "max_output_tokens": 500}
    whole = client.responses.create(input=turns, **asked)
    with client.responses.stream(input=turns, **asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(len(numbers))), numbers
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    for answer in (whole, *client.responses.create(input=turns, stream=True, **asked)):
        check_types(answer)
    for response in (whole, final):
        reasoning, message, call = response.output
        assert reasoning.type == "reasoning" and reasoning.content[0].text == "Hm."
        assert message.type == "message" and response.output_text == "Let me see."
        assert call.type == "function_call" and call.arguments == '{"item": "t\\"a", "n": 3}'
        assert response.status == "completed" and response.usage.total_tokens > 0
        assert response.usage.output_tokens_details.reasoning_tokens > 0
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    turns += [item.to_dict() for item in whole.output[:2]]
    turns += [whole.output[2].to_dict(), {**result, "call_id": whole.output[2].call_id}]
    answer = client.responses.create(input=[*turns, said("Three.")], **asked)
    assert answer.output_text == "Three."


def check_fields(client: OpenAI) -> None:
    """Fields of a request come back as the types have them."""
    allowed = {"type": "allowed_tools", "tools": [{"type": "function", "name": "stock_of"}]}
    asked: dict[str, Any] = {
        "instructions": "Be kind.",
        "metadata": {"a": "b"},
        "reasoning": {"summary": "auto"},
        "text": {"verbosity": "medium"},
        "tools": [{"type": "function", "name": "stock_of"}],
        "tool_choice": {**allowed, "mode": "auto"},
        "max_tool_calls": 3,
        "user": "u",
        "prompt_cache_key": "k",
        "truncation": "auto",
        "include": ["reasoning.encrypted_content", "web_search_call.results"],
        "store": True,
    }
    answer = client.responses.create(model="base", input="SAY:x", **asked)
    check_types(answer)
    again = answer.to_dict()
    for name in ("instructions", "metadata", "max_tool_calls", "user", "truncation", "tool_choice"):
        assert again[name] == asked[name], name
    assert (answer.text.format.type, answer.text.verbosity) == ("text", "medium")


def check_logprobs(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "base",
        "input": f"SAY:<think>Hm.</think>\n Yes é.\n{CALL}",
        "tools": [TOOL],
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    }
    whole = client.responses.create(**asked)
    events = list(client.responses.create(stream=True, **asked))
    for answer in (whole, *events):
        check_types(answer)
    sent = [e for e in events if e.type == "response.output_text.delta"]
    for response in (whole, events[-1].response):
        _, message, _ = response.output
        [part] = message.content
        assert bytes(b for each in part.logprobs for b in each.bytes).decode() == "Yes é."
        assert all(len(each.top_logprobs) == 2 for each in part.logprobs)
        assert all(math.isfinite(each.logprob) for each in part.logprobs)
    assert [p.token for e in sent for p in e.logprobs] == [p.token for p in part.logprobs]
    assert [p.token for p in sent[0].logprobs] == ["Y"]


def check_ends(client: OpenAI) -> None:
    whole = client.responses.create(model="base", input="SAY:one two", max_output_tokens=3)
    with client.responses.stream(model="base", input="SAY:one two", max_output_tokens=3) as stream:
        last = list(stream)[-1]
    check_types(whole)
    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert (response.status, response.output_text) == ("incomplete", "one")
        assert response.incomplete_details.reason == "max_output_tokens"
    empty = client.responses.create(model="base", input="SAY:")
    assert empty.output_text == "" and empty.output[0].type == "message"


def check_parse(client: OpenAI) -> None:
    said_json = 'SAY:{"is_good": true}'
    parsed = client.responses.parse(model="base", input=said_json, text_format=Answer)
    assert parsed.output_parsed == Answer(is_good=True)


def check_refusals(client: OpenAI) -> None:
    for fields, named in (
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type: 'web_search' is not supported"),
    ):
        try:
            client.responses.create(model="base", input="x", **fields)
        except openai.BadRequestError as caught:
            assert named in str(caught), caught
        else:
            raise AssertionError(f"{fields} was accepted")


def main() -> None:
    with OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0) as client:
        check_items(client)
        check_fields(client)
        check_logprobs(client)
        check_ends(client)
        check_parse(client)
        check_refusals(client)


if __name__ == "__main__":
    main()
