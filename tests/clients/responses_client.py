"""The official OpenAI client's responses against a server that says what it is told to.

    python tests/clients/responses_client.py <base url>

Ends with 0 if everything held.
"""

import sys
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


class Answer(BaseModel):
    is_good: bool


def said(text: str) -> dict[str, Any]:
    return {"role": "user", "content": f"SAY:{text}"}


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


def check_ends(client: OpenAI) -> None:
    whole = client.responses.create(model="base", input="SAY:one two", max_output_tokens=3)
    with client.responses.stream(model="base", input="SAY:one two", max_output_tokens=3) as stream:
        last = list(stream)[-1]
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
        check_ends(client)
        check_parse(client)
        check_refusals(client)


if __name__ == "__main__":
    main()
