"""OpenAI's Responses API over HTTP, with an engine that answers what it is told to."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from deployments.ingress.api.responses_answers import ResponseAnswer
from tests.deployments.support.dictated import (
    CALL,
    SETTINGS,
    THINKING,
    dictated,
    named_events,
    prompt_of,
)
from tests.deployments.support.fakes import Answered, Server, byte_vocabulary, serving
from tests.deployments.support.loopback import listening, run_client

RESPONSES = "/v1/responses"
TOOL = {"type": "function", "name": "stock_of", "parameters": {"type": "object"}}
CALLED = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}


def in_server(test: Callable[[Server], Awaitable[None]], **more: Any) -> None:
    async def run() -> None:
        settings = {"vocabulary": byte_vocabulary(THINKING), "ingress_settings": SETTINGS}
        async with serving(more.pop("engine", dictated()), **settings, **more) as server:
            await test(server)

    asyncio.run(run())


async def ask(server: Server, given: Any = "SAY:Yes.", **fields: Any) -> Answered:
    return await server.post(RESPONSES, **{"input": given, **fields})


def test_the_official_client_reads_items_and_their_streams() -> None:
    async def test(server: Server) -> None:
        async with listening(server.api) as url:
            await run_client("responses_client.py", url)

    in_server(test)


SAID = ["", "Yes.", 'é🐟\n\n" data: x', "<think>Hm.</think>Yes.", f"See.\n{CALL}\n{CALL}"]


@pytest.mark.parametrize("said", SAID)
def test_a_stream_ends_with_the_whole_response(said: str) -> None:
    async def test(server: Server) -> None:
        whole = (await ask(server, f"SAY:{said}", tools=[TOOL])).json
        events = named_events(await ask(server, f"SAY:{said}", tools=[TOOL], stream=True))
        assert all(name == data["type"] for name, data in events)
        assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
        done = [data["item"] for name, data in events if name == "response.output_item.done"]
        streamed = events[-1][1]["response"]
        assert ResponseAnswer.model_validate(whole, strict=True).model_extra == {}
        assert streamed["output"] == done
        for response in (whole, streamed):
            response.pop("id")
            for item in response["output"]:
                item.pop("id")
                item.pop("call_id", None)
        assert streamed == whole and whole["store"] is False

    in_server(test)


def test_an_error_in_a_stream_is_followed_by_the_response_that_failed() -> None:
    async def test(server: Server) -> None:
        events = named_events(await ask(server, "SAY:abcDIE", stream=True))
        *begun, (name, error), (last, failed) = events
        assert (name, last) == ("error", "response.failed")
        assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
        response = failed["response"]
        assert response["status"] == "failed" and response["id"] == begun[0][1]["response"]["id"]
        assert response["error"] == {"code": "server_error", "message": error["message"]}

    in_server(test, engine=dictated(dies_at="DIE"), patience_s=0.05)


def test_items_become_the_templates_messages() -> None:
    async def test(server: Server) -> None:
        items = [
            {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
            {"type": "message", "role": "user", "content": "?"},
            {
                "type": "reasoning",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "Hm"}],
            },
            {"role": "assistant", "content": [{"type": "output_text", "text": "See."}]},
            CALLED,
            {"type": "function_call_output", "call_id": "a", "output": "3"},
            {"role": "user", "content": "SAY:x"},
        ]
        assert (await ask(server, items, instructions="Hi.", tools=[TOOL])).status == 200
        prompt = prompt_of(server.engine.requests[-1])
        assert prompt.partition("<|system|>")[2] == (
            "Hi.<|end|><|system|>Be kind.<|end|><|user|>?<|end|><|assistant|>Hm|See.\n<tool_call>\n"
            '{"name": "f", "arguments": {}}\n</tool_call><|end|><|tool|>3<|end|>'
            "<|user|>SAY:x<|end|><|assistant|>"
        )

    in_server(test)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": []}, "input: must be text or a list of items"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type: 'item_reference'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"role": "tool", "content": ""}]}, "input[0].role: must be one of"),
        ({"input": [{**CALLED, "arguments": "["}]}, "input[0].arguments: must be the text of"),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": ""}]},
            "input[0].call_id",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens must be at least 1"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type: 'web_search' is not supported"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name: must match"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type: 'file_search'"),
        ({"tool_choice": "required"}, "tool_choice: a call is only possible with tools"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x"}}},
            "text.format.schema: is required",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity: "),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort: 'low' would do nothing"),
        ({"previous_response_id": "x"}, "previous_response_id is not supported"),
        ({"conversation": "x"}, "conversation is not supported"),
        ({"background": True}, "background: "),
        ({"truncation": "oldest"}, "truncation: "),
        ({"include": ["message.output_text.entropy"]}, "include[0]: "),
        ({"top_logprobs": 2}, "top_logprobs: only allowed when include has"),
        ({"metadata": {"a": 1}}, "metadata.a: "),
        ({"tool_choice": "any"}, "tool_choice: must be one of none, auto, required"),
        ({"n": 2}, "Unknown field: n"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], named: str) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, **fields)
        assert answer.status == 400, answer.body
        assert answer.error["message"].startswith(named), answer.body
        assert server.engine.requests == []

    in_server(test)


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


RESULT = {"type": "function_call_output", "call_id": "a", "output": "3"}
LONG = "x" * 2500
TURNS: list[Any] = [
    said("developer", "Be kind."),
    said("assistant", "Hello."),
    said("user", LONG),
    CALLED,
    said("user", f"{LONG}2"),
    RESULT,  # of a call in the turn before
    said("assistant", "See."),
    said("user", f"{LONG}3"),
    said("user", "SAY:x"),
]


@pytest.mark.parametrize(
    ("max_model_len", "kept"),
    [
        (8192, TURNS),
        (6000, [TURNS[0], TURNS[4], *TURNS[6:]]),
        (3500, [TURNS[0], *TURNS[7:]]),
        (1000, [TURNS[0], TURNS[8]]),
    ],
)
def test_truncation_drops_as_few_of_the_oldest_turns_as_it_can(
    max_model_len: int, kept: list[Any]
) -> None:
    async def test(server: Server) -> None:
        asked = {"tools": [TOOL], "max_output_tokens": 100}
        answer = await ask(server, TURNS, truncation="auto", **asked)
        assert (answer.status, answer.json["truncation"]) == (200, "auto")
        assert (await ask(server, kept, **asked)).status == 200
        first, second = map(prompt_of, server.engine.requests)
        assert first == second

    engine = dictated()
    engine.info = replace(engine.info, max_model_len=max_model_len)
    in_server(test, engine=engine)


def test_a_last_turn_that_is_too_long_is_refused() -> None:
    async def test(server: Server) -> None:
        turns = [*TURNS, said("user", 3 * LONG)]
        answer = await ask(server, turns, truncation="auto", max_output_tokens=1000)
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")

    in_server(test)
