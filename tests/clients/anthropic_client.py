"""The official Anthropic client against a running server, sync and async.

    python tests/clients/anthropic_client.py <base url> <base model> <adapter>
    python tests/clients/anthropic_client.py <base url>

The second is for a server whose model says what stands behind `SAY:` in the last message. Runs in
an environment of its own (requirements.txt); ends with 0 if everything held.
"""

import asyncio
import sys
from typing import Any

import anthropic
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "Hello!"}]
GREEDY: dict[str, Any] = {"max_tokens": 12, "extra_body": {"temperature": 0}}

CALL = '<tool_call>\n{"name": "stock_of", "arguments": {"item": "t\\"a", "n": 3}}\n</tool_call>'
TOOL = {
    "name": "stock_of",
    "description": "How many there are.",
    "input_schema": {
        "type": "object",
        "properties": {"item": {"type": "string"}, "n": {"type": "integer"}},
    },
}


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def refused(kind: type[anthropic.APIStatusError], client: Anthropic, **fields: Any) -> str:
    try:
        client.messages.create(**{"messages": MESSAGES, "max_tokens": 5, **fields})
    except kind as caught:
        assert caught.type is not None
        return str(caught)
    raise AssertionError(f"{fields} was accepted")


# ---- a real model --------------------------------------------------------------------------


def check_messages(client: Anthropic, base: str, adapter: str) -> None:
    texts = {}
    for model in (base, adapter):
        whole = client.messages.create(model=model, messages=MESSAGES, system="Be kind.", **GREEDY)
        assert whole.model == model and whole.stop_reason in ("max_tokens", "end_turn")
        with client.messages.stream(
            model=model, messages=MESSAGES, system="Be kind.", **GREEDY
        ) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == text_of(whole) == text_of(final)
        assert final.stop_reason == whole.stop_reason
        assert final.usage.output_tokens == whole.usage.output_tokens <= 12
        counted = client.messages.count_tokens(model=model, messages=MESSAGES, system="Be kind.")
        for usage in (whole.usage, final.usage):
            read = usage.cache_read_input_tokens
            assert read is not None and usage.input_tokens + read == counted.input_tokens
        texts[model] = text
    assert texts[base] != texts[adapter], "the adapter must change what is said"


def check_models_and_errors(client: Anthropic, base: str, adapter: str) -> None:
    models = {model.id: model for model in client.models.list(limit=1)}
    assert {base, adapter} <= set(models) and models[base].created_at.year > 2000
    assert client.models.retrieve(adapter).display_name == adapter
    refused(anthropic.NotFoundError, client, model="nobody")
    refused(anthropic.BadRequestError, client, model=base, extra_body={"nonsense": 1})
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/"}}
    pictures = [{"role": "user", "content": [image]}]
    message = refused(anthropic.BadRequestError, client, model=base, messages=pictures)
    assert "messages[0].content[0].type: 'image'" in message


async def check_async(url: str, base: str, adapter: str) -> None:
    async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:

        async def one(model: str) -> str:
            async with client.messages.stream(model=model, messages=MESSAGES, **GREEDY) as stream:
                return await stream.get_final_text()

        texts = await asyncio.gather(*(one(model) for model in (base, adapter) * 4))
        assert len(set(texts[::2])) == len(set(texts[1::2])) == 1, "concurrency changed an answer"


class Answer(BaseModel):
    is_good: bool


def check_structured(client: Anthropic, base: str) -> None:
    parsed = client.messages.parse(
        model=base, messages=MESSAGES, output_format=Answer, **{**GREEDY, "max_tokens": 100}
    )
    assert isinstance(parsed.parsed_output, Answer)


# ---- a model that says what it is told to --------------------------------------------------


def said(text: str) -> dict[str, Any]:
    return {"role": "user", "content": f"SAY:{text}"}


def check_blocks(client: Anthropic) -> None:
    turns = [said(f"<think>Hm.</think>Let me see.\n{CALL}")]
    asked: dict[str, Any] = {"model": "base", "max_tokens": 500, "tools": [TOOL]}
    whole = client.messages.create(messages=turns, **asked)
    with client.messages.stream(messages=turns, **asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert {"thinking", "signature", "text", "input_json"} <= set(kinds)
    for message in (whole, final):
        thinking, text, call = message.content
        assert thinking.type == "thinking" and thinking.thinking == "Hm." and thinking.signature
        assert text.type == "text" and text.text == "Let me see."
        assert call.type == "tool_use" and call.input == {"item": 't"a', "n": 3}
        assert message.stop_reason == "tool_use"
    call = final.content[2]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "3"}
    turns += [final.to_param(), {"role": "user", "content": [result, *blocks("SAY:Three.")]}]
    assert text_of(client.messages.create(messages=turns, **asked)) == "Three."
    counted = client.messages.count_tokens(model="base", messages=turns, tools=[TOOL])
    assert counted.input_tokens > 100


def blocks(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]


def check_ends(client: Anthropic) -> None:
    def end(**fields: Any) -> tuple[str | None, str | None]:
        asked = {"model": "base", "messages": [said("one two")], "max_tokens": 9, **fields}
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            final = stream.get_final_message()
        assert text_of(whole) == text_of(final)
        assert (whole.stop_reason, whole.stop_sequence) == (final.stop_reason, final.stop_sequence)
        assert whole.usage == final.usage
        return whole.stop_reason, whole.stop_sequence

    assert end() == ("end_turn", None)
    assert end(max_tokens=3) == ("max_tokens", None)
    assert end(stop_sequences=[" t"]) == ("stop_sequence", " t")


def check_error_in_stream(client: Anthropic) -> None:
    """The server's engine dies at this word."""
    stream = client.messages.create(
        model="base", messages=[said("word " * 99 + "DIE")], max_tokens=900, stream=True
    )
    try:
        events = list(stream)
    except anthropic.APIStatusError as caught:
        assert caught.type == "overloaded_error", caught
    else:
        raise AssertionError(f"the stream has no error: {events[-1]}")


def main() -> None:
    url = sys.argv[1]
    with Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        if len(sys.argv) == 2:
            check_blocks(client)
            check_ends(client)
            check_error_in_stream(client)
            return
        base, adapter = sys.argv[2:]
        check_messages(client, base, adapter)
        check_structured(client, base)
        check_models_and_errors(client, base, adapter)
    asyncio.run(check_async(url, base, adapter))


if __name__ == "__main__":
    main()
