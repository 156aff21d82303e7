"""Anthropic's Messages API over HTTP, with an engine that answers what it is told to."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from deployments.config_sections import IngressSection
from tests.deployments.support.dictated import (
    CALL,
    OTHER,
    SETTINGS,
    THINKING,
    dictated,
    named_events,
    prompt_of,
)
from tests.deployments.support.fakes import (
    Answered,
    Client,
    FakeEngine,
    Server,
    byte_vocabulary,
    serving,
    until,
)
from tests.deployments.support.tool_templates import template_of

MESSAGES = "/v1/messages"
ARGUMENTS = {"item": 'te"a', "n": 3}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"name": name, "description": "It counts.", "input_schema": schema}


TOOLS = [tool("stock_of", item={"type": "string"}, n={"type": "integer"}), tool("price_of")]


def in_server(
    test: Callable[[Server], Awaitable[None]],
    template: str = THINKING,
    engine: FakeEngine | None = None,
    **how: Any,
) -> None:
    async def run() -> None:
        vocabulary = byte_vocabulary(template)
        settings = {"ingress_settings": SETTINGS, **how}
        async with serving(engine or dictated(), vocabulary=vocabulary, **settings) as server:
            await test(server)

    asyncio.run(run())


async def ask(server: Server, said: Any = "SAY:Yes.", **fields: Any) -> Answered:
    messages = said if isinstance(said, list) else [{"role": "user", "content": said}]
    return await server.post(MESSAGES, **{"messages": messages, "max_tokens": 500, **fields})


def message_of(answer: Answered) -> dict[str, Any]:
    """The message of a whole answer, or what a client puts together from a stream's events."""
    assert answer.status == 200, answer.body
    if answer.body.startswith(b"{"):
        return answer.json
    events = named_events(answer)
    assert all(name == data["type"] for name, data in events)
    message: dict[str, Any] = events[0][1]["message"]
    assert events[0][0] == "message_start" and message["content"] == []
    for name, data in events[1:]:
        gather(message, name, data)
    assert events[-1] == ("message_stop", {"type": "message_stop"})
    return message


def gather(message: dict[str, Any], name: str, data: dict[str, Any]) -> None:
    content = message["content"]
    if name == "content_block_start":
        assert data["index"] == len(content), "blocks overlap"
        content.append(data["content_block"])
    elif name == "content_block_delta":
        delta, block = data["delta"], content[data["index"]]
        kind = delta.pop("type")
        [(field, text)] = delta.items()
        fitting = {"text": "text_delta", "thinking": "thinking_delta"}
        fitting |= {"signature": "signature_delta", "partial_json": "input_json_delta"}
        assert fitting[field] == kind
        if field == "partial_json":
            block["input"] = json.loads(text)
        else:
            block[field] += text
    elif name == "message_delta":
        message.update(data["delta"])
        message["usage"] = data["usage"]


def error_of(answer: Answered) -> tuple[str, str]:
    assert set(answer.json) == {"type", "error"} and answer.json["type"] == "error"
    assert set(answer.json["error"]) == {"type", "message"}
    return answer.error["type"], answer.error["message"]


# ---- answers -------------------------------------------------------------------------------


def test_an_answer_has_anthropics_form() -> None:
    async def test(server: Server) -> None:
        message = message_of(await ask(server))
        assert message.pop("id").startswith("msg_")
        prompt = prompt_of(server.engine.requests[0])
        assert message == {
            "type": "message",
            "role": "assistant",
            "model": "base",
            "content": [{"type": "text", "text": "Yes."}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {
                "input_tokens": len(prompt) - 2,
                "cache_read_input_tokens": 2,
                "cache_creation_input_tokens": 0,
                "output_tokens": 5,
                "output_tokens_details": {"thinking_tokens": 0},
            },
        }

    in_server(test)


SAID = [
    "",
    "Yes.",
    'é🐟\u2028\n\n"quoted" \\ data: x',
    "<think>Hm, \né.</think>\n\nYes.",
    "<think>Hm.</think>",
    f"{CALL}\n{OTHER}",
    f"Let me see.\n{CALL}",
    f"<think>Hm.</think>\nLet me see.\n{CALL}",
    f"{CALL}\nDone.",
]


@pytest.mark.parametrize("template", [THINKING, template_of("hermes")])
@pytest.mark.parametrize("said", SAID)
def test_a_stream_comes_to_the_same_message(said: str, template: str) -> None:
    async def test(server: Server) -> None:
        for fields in ({"tools": TOOLS}, {}):
            whole = message_of(await ask(server, f"SAY:{said}", **fields))
            streamed = message_of(await ask(server, f"SAY:{said}", stream=True, **fields))
            for message in (whole, streamed):
                message.pop("id")
                ids = [block.pop("id") for block in message["content"] if "id" in block]
                assert len(set(ids)) == len(ids) and all(i.startswith("toolu_") for i in ids)
            assert streamed == whole

    in_server(test, template)


def test_blocks_are_in_the_order_in_which_they_were_written() -> None:
    async def test(server: Server) -> None:
        said = f"SAY:<think>Hm.</think>\nLet me see.\n{CALL}\n{OTHER}"
        message = message_of(await ask(server, said, tools=TOOLS))
        for block in message["content"]:
            block.pop("id", None)
        assert message["content"] == [
            {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"},
            {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "name": "stock_of", "input": ARGUMENTS},
            {"type": "tool_use", "name": "price_of", "input": {}},
        ]
        assert message["stop_reason"] == "tool_use"
        num_thinking = len("<think>Hm.")
        assert message["usage"]["output_tokens_details"] == {"thinking_tokens": num_thinking}

    in_server(test)


def test_a_stream_has_anthropics_events_in_their_order() -> None:
    async def test(server: Server) -> None:
        said = f"SAY:<think>Hm.</think>\nSee.\n{CALL}"
        events = named_events(await ask(server, said, tools=TOOLS, stream=True))
        names = [name for name, _ in events]
        kinds = [
            data["delta"]["type"] for name, data in events if "delta" in data and "index" in data
        ]
        starts = [at for at, name in enumerate(names) if name == "content_block_start"]
        ends = [at for at, name in enumerate(names) if name == "content_block_stop"]
        assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
        assert [start < end for start, end in zip(starts, ends, strict=True)] == [True] * 3
        assert [end + 1 for end in ends] == [*starts[1:], len(names) - 2]
        assert list(dict.fromkeys(kinds)) == [
            "thinking_delta",
            "signature_delta",
            "text_delta",
            "input_json_delta",
        ]
        usage = events[0][1]["message"]["usage"]
        assert usage["cache_read_input_tokens"] == 2 and usage["input_tokens"] > 0
        assert events[-2][1]["usage"]["input_tokens"] == usage["input_tokens"]

    in_server(test)


@pytest.mark.parametrize("stream", [False, True])
def test_why_an_answer_ended(stream: bool) -> None:
    async def test(server: Server) -> None:
        async def end(**fields: Any) -> tuple[str, str | None]:
            message = message_of(await ask(server, "SAY:one two", stream=stream, **fields))
            return message["stop_reason"], message["stop_sequence"]

        assert await end() == ("end_turn", None)
        assert await end(max_tokens=3) == ("max_tokens", None)
        assert await end(stop_sequences=["x", " t"]) == ("stop_sequence", " t")
        assert await end(stop_sequences=["x"]) == ("end_turn", None)

    in_server(test)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_where_the_context_does(stream: bool) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, "SAY:" + "word " * 1500, max_tokens=10**9, stream=stream)
        message = message_of(answer)
        assert message["stop_reason"] == "model_context_window_exceeded"
        num_prompt = sum(message["usage"][f"{kind}input_tokens"] for kind in ("", "cache_read_"))
        assert num_prompt + message["usage"]["output_tokens"] == 8192

    in_server(test)


def test_reasoning_may_be_left_out() -> None:
    async def test(server: Server) -> None:
        for stream in (False, True):
            thinking = {"type": "adaptive", "display": "omitted"}
            said = "SAY:<think>Hm.</think>Yes."
            message = message_of(await ask(server, said, thinking=thinking, stream=stream))
            assert message["content"] == [{"type": "text", "text": "Yes."}]

    in_server(test)


def test_a_schema_is_enforced_as_in_chats() -> None:
    async def test(server: Server) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        wanted = {"format": {"type": "json_schema", "schema": schema}}
        message = message_of(await ask(server, "SAY:{}", output_config=wanted))
        assert message["content"] == [{"type": "text", "text": "{}"}]
        grammar = server.engine.requests[-1].sampling.grammar
        assert grammar is not None and '"a"' in grammar

    in_server(test)


# ---- prompts -------------------------------------------------------------------------------


def seen(server: Server) -> str:
    return prompt_of(server.engine.requests[-1])


def test_messages_become_the_templates() -> None:
    async def test(server: Server) -> None:
        text = {"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}
        messages = [
            {"role": "user", "content": "one"},
            {"role": "user", "content": [text, text]},
            {"role": "assistant", "content": [{"type": "text", "text": "yes", "citations": None}]},
            {"role": "system", "content": "now"},
            {"role": "user", "content": "SAY:x"},
        ]
        system = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
        await ask(server, messages, system=system)
        assert seen(server) == (
            "<|system|>Be\nbrief.<|end|><|user|>one\ntwo\ntwo<|end|><|assistant|>yes<|end|>"
            "<|system|>now<|end|><|user|>SAY:x<|end|><|assistant|>"
        )

    in_server(test, template_of("hermes"))


def test_an_answer_with_calls_may_be_sent_back_with_their_results() -> None:
    async def test(server: Server) -> None:
        question = {"role": "user", "content": f"SAY:<think>Hm.</think>See.{CALL}{OTHER}"}
        answer = message_of(await ask(server, [question], tools=TOOLS))
        ids = [block["id"] for block in answer["content"] if block["type"] == "tool_use"]
        results = [
            {"type": "tool_result", "tool_use_id": ids[0], "content": "3"},
            {
                "type": "tool_result",
                "tool_use_id": ids[1],
                "content": [{"type": "text", "text": "none"}],
                "is_error": True,
            },
            {"type": "text", "text": "SAY:Three."},
        ]
        redacted = {"type": "redacted_thinking", "data": "x"}
        turns = [
            question,
            {"role": "assistant", "content": [redacted, *answer["content"]]},
            {"role": "user", "content": results},
        ]
        assert message_of(await ask(server, turns, tools=TOOLS))["stop_reason"] == "end_turn"
        _, _, rest = seen(server).partition("<|assistant|>")
        assert rest == (
            f"Hm.|See.\n{CALL}\n{OTHER}<|end|><|tool|>3<|end|><|tool|>Error: none<|end|>"
            "<|user|>SAY:Three.<|end|><|assistant|>"
        )

    in_server(test)


def test_a_last_answer_is_continued() -> None:
    async def test(server: Server) -> None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "SAY:{"}]
        message = message_of(await ask(server, turns))
        assert seen(server).endswith("<|assistant|>SAY:{")
        assert message["content"] == [{"type": "text", "text": "{"}]

    in_server(test, template_of("hermes"))


def test_templates_are_told_the_names_of_tools_whose_results_they_show() -> None:
    template = template_of("hermes").replace("<|tool|>", "<|tool {{ m.name }}|>")

    async def test(server: Server) -> None:
        use = {"type": "tool_use", "id": "a", "name": "stock_of", "input": {}}
        turns = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]},
        ]
        assert (await ask(server, turns, tools=TOOLS)).status == 200
        assert "<|tool stock_of|><|end|>" in seen(server)

    in_server(test, template)


@pytest.mark.parametrize(
    ("thinking", "shown"),
    [
        (None, ""),
        ({"type": "disabled"}, "[thinking False]"),
        ({"type": "adaptive"}, "[thinking True]"),
        ({"type": "enabled", "budget_tokens": 1024}, "[thinking True]"),
    ],
)
def test_thinking_is_switched_in_the_template(thinking: Any, shown: str) -> None:
    async def test(server: Server) -> None:
        assert (await ask(server, thinking=thinking)).status == 200
        assert seen(server).startswith(shown + "<|user|>")

    in_server(test)


def test_an_effort_is_given_to_templates_that_read_it() -> None:
    async def test(server: Server) -> None:
        assert (await ask(server, output_config={"effort": "low"})).status == 200
        assert seen(server).startswith("low")

    in_server(test, "{{ reasoning_effort }}" + template_of("hermes"))


def test_sampling_is_passed_on() -> None:
    async def test(server: Server) -> None:
        extras = {"min_p": 0.1, "repetition_penalty": 1.1, "seed": 7, "cache_salt": "s"}
        answer = await ask(server, temperature=0.5, top_p=0.9, top_k=5, **extras)
        request = server.engine.requests[0]
        sampling = request.sampling
        assert answer.status == 200 and request.cache_salt == "s"
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 5)
        assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.1, 1.1, 7)

    in_server(test)


@pytest.mark.parametrize(
    ("choice", "has_tools"), [({"type": "auto"}, True), ({"type": "none"}, False), (None, True)]
)
def test_a_choice_of_tools_is_that_of_chats(choice: Any, has_tools: bool) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, f"SAY:{CALL}", tools=TOOLS, tool_choice=choice)
        kinds = [block["type"] for block in message_of(answer)["content"]]
        assert kinds == (["tool_use"] if has_tools else ["text"])
        assert seen(server).startswith("TOOLS:") == has_tools

    in_server(test)


def test_one_call_alone_may_be_asked_for() -> None:
    async def test(server: Server) -> None:
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        answer = await ask(server, f"SAY:{CALL}{OTHER}", tools=TOOLS, tool_choice=choice)
        assert [block["name"] for block in message_of(answer)["content"]] == ["stock_of"]

    in_server(test)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "stock_of"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_may_be_asked_for(choice: Any, stream: bool) -> None:
    async def test(server: Server) -> None:
        said = f"SAY:{CALL}"
        message = message_of(
            await ask(server, said, tools=TOOLS, tool_choice=choice, stream=stream)
        )
        assert [block["type"] for block in message["content"]] == ["tool_use"]
        assert message["content"][0]["input"] == ARGUMENTS
        assert message["stop_reason"] == "tool_use"
        assert server.engine.requests[-1].sampling.grammar is not None

    in_server(test)


HABITS = {
    "metadata": {"user_id": "me"},
    "service_tier": "auto",
    "cache_control": {"type": "ephemeral"},
    "diagnostics": {"previous_message_id": None},
    "mcp_servers": [],
    "container": None,
    "speed": "standard",
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "stop_sequences": [],
    "tools": [],
    "system": "",
}


def test_what_changes_no_answer_is_accepted() -> None:
    async def test(server: Server) -> None:
        assert message_of(await ask(server, **HABITS))["content"][0]["text"] == "Yes."
        custom = {**TOOLS[0], "type": "custom", "cache_control": {}, "eager_input_streaming": True}
        custom |= {"allowed_callers": ["direct"], "defer_loading": False, "strict": True}
        assert (await ask(server, tools=[custom])).status == 200

    in_server(test)


# ---- refusals ------------------------------------------------------------------------------

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
USER = {"role": "user", "content": "x"}


def one(*blocks: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens: "),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": "9"}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        ({"messages": "x"}, "messages: "),
        ({"messages": [USER] * 2049}, "messages: must have at most 2048"),
        ({"messages": [0]}, "messages[0]: must be an object"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role: must be one of user"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: must be text or a list"),
        ({"messages": [{**USER, "name": "x"}]}, "Unknown field: messages[0].name"),
        (one(IMAGE), "messages[0].content[0].type: 'image' is not supported"),
        (one({"type": "document"}), "messages[0].content[0].type: 'document' is not supported"),
        (one({"type": 5}), "messages[0].content[0]: must be an object with a type"),
        (one("x"), "messages[0].content[0]: must be an object with a type"),
        (one({"type": "text", "text": 5}), "messages[0].content[0].text: must be text, not 5"),
        (one({"type": "text", "text": "", "a": 1}), "Unknown field: messages[0].content[0].a"),
        (one(*[{"type": "text", "text": ""}] * 1025), "messages[0].content: must have at most"),
        (one(USE), "messages[0].content[0].type: messages of the role 'user' have no 'tool_use'"),
        (one(RESULT), "messages[0].content[0].tool_use_id: no tool_use before it has the id 'a'"),
        (one(USE, role="assistant"), "messages[0].content[0]: the last message cannot be a call"),
        (one({**USE, "input": "{}"}, role="assistant"), "messages[0].content[0].input: "),
        (one({**USE, "name": "a b"}, role="assistant"), "messages[0].content[0].name: must match"),
        (one({**USE, "caller": {"type": "x"}}, role="assistant"), "messages[0].content[0].caller"),
        (
            {"messages": [USER, *one(USE, role="assistant")["messages"], *one(IMAGE)["messages"]]},
            "messages[2].content[0].type: 'image'",
        ),
        (
            {
                "messages": [
                    *one(USE, role="assistant")["messages"],
                    *one({**RESULT, "content": [IMAGE]})["messages"],
                ]
            },
            "messages[1].content[0].content[0].type: only 'text' is supported here, not 'image'",
        ),
        ({"system": 5}, "system: must be text or a list of blocks"),
        ({"system": [IMAGE]}, "system[0].type: only 'text' is supported"),
        ({"temperature": 1.5}, "temperature: Input should be less than or equal to 1, not 1.5"),
        ({"top_p": 2}, "top_p must be"),
        ({"stop_sequences": [""]}, "stop_sequences: "),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type: 'web"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema: is required"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name: must match"),
        ({"tools": [{"name": "f", "input_schema": {"type": "x"}}]}, "tools[0].input_schema.type: "),
        ({"tools": [{**TOOLS[0], "input_examples": [{}]}]}, "tools[0].input_examples: must be"),
        ({"tools": [{**TOOLS[0], "defer_loading": True}]}, "tools[0].defer_loading: must be false"),
        ({"tools": [{**TOOLS[0], "allowed_callers": ["x"]}]}, "tools[0].allowed_callers: "),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].name: 'stock_of' is the name of two tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: a call is only possible with tools"),
        ({"tool_choice": {"type": "x"}}, "tool_choice.type: must be 'auto', 'any', 'tool' or"),
        ({"tool_choice": {"type": "auto", "name": "x"}}, "tool_choice.name: only the type 'tool'"),
        ({"tool_choice": {"type": "tool"}, "tools": TOOLS}, "tool_choice.name: must match"),
        (
            {"tool_choice": {"type": "tool", "name": "x"}, "tools": TOOLS},
            "tool_choice: no tool is called 'x'",
        ),
        ({"thinking": {"type": "between_tools"}}, "thinking.type: "),
        ({"thinking": {"type": "enabled"}}, "thinking: budget_tokens: belongs to"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens: "),
        ({"thinking": {"type": "disabled", "budget_tokens": 2000}}, "thinking: budget_tokens: "),
        ({"output_config": {"effort": "low"}}, "output_config.effort: 'low' would do nothing"),
        ({"output_config": {"format": {"type": "json"}}}, "output_config.format.type: must be"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
            "output_config.format.schema: not",
        ),
        (
            {"output_config": {"format": {"type": "json_schema"}}},
            "output_config.format.schema: is required",
        ),
        ({"container": "x"}, "container is not supported"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported"),
        ({"inference_geo": "us"}, "inference_geo is not supported"),
        ({"speed": "fast"}, "speed: "),
        ({"context_management": {"edits": [{"type": "x"}]}}, "context_management: nothing is left"),
        ({"n": 2}, "Unknown field: n"),
        ({"model": 5}, "model: "),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], named: str) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(MESSAGES, **{"messages": [USER], "max_tokens": 9, **fields})
        kind, message = error_of(answer)
        assert (answer.status, kind) == (400, "invalid_request_error")
        assert message.startswith(named), message
        assert server.engine.requests == []

    in_server(test)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": TOOLS}, "tools: this model cannot be used with tools"),
        (
            {
                "system": "s",
                "messages": [
                    USER,
                    *one(USE, role="assistant")["messages"],
                    *one(RESULT)["messages"],
                ],
            },
            "messages[1]: this model cannot be used with tools",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.type: this model"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_its_own_name(
    fields: dict[str, Any], named: str
) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(MESSAGES, **{"messages": [USER], "max_tokens": 9, **fields})
        assert answer.status == 400 and error_of(answer)[1].startswith(named), answer.body
        for thinking in ({"type": "disabled"}, {"type": "adaptive"}):
            assert (await ask(server, thinking=thinking)).status == 200

    in_server(test, "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")


def test_thinking_that_cannot_be_switched_off_is_refused() -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, thinking={"type": "disabled"})
        assert answer.status == 400
        assert error_of(answer)[1].startswith("thinking: 'none' would do nothing")

    in_server(test, "{# <think> </think> #}" + template_of("hermes"))


def test_errors_have_anthropics_types_and_statuses() -> None:
    async def test(server: Server) -> None:
        async def error(body: Any = None, **fields: Any) -> tuple[int, str]:
            answer = await ask(server, model="nobody") if body is None else body
            return answer.status, error_of(answer)[0]

        assert await error() == (404, "not_found_error")
        large = await ask(server, "x" * 2**20)
        assert await error(large) == (413, "request_too_large")
        assert await error(await server.call("POST", MESSAGES, [1])) == (
            400,
            "invalid_request_error",
        )

    in_server(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_529_with_the_time_to_wait(stream: bool) -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        first = asyncio.create_task(ask(server))
        await until(lambda: len(server.engine.requests) == 1)
        answer = await ask(server, stream=stream)
        assert (answer.status, error_of(answer)[0]) == (529, "overloaded_error")
        assert answer.headers["retry-after"] == "1"
        server.engine.running.set()
        await first

    in_server(test, max_requests=1)


def test_an_error_in_a_stream_is_its_last_event() -> None:
    async def test(server: Server) -> None:
        body = {"model": "base", "messages": [USER], "max_tokens": 9, "stream": True}
        body["messages"] = [{"role": "user", "content": "SAY:" + "word " * 100}]
        client = Client(
            server.api, "POST", MESSAGES, json.dumps({**body, "max_tokens": 500}).encode()
        )
        await until(lambda: b"text_delta" in client.answered.body)
        server.engine.die()
        await client.done
        *_, (name, data) = named_events(client.answered)
        assert (name, data["type"]) == ("error", "error")
        assert data["error"]["type"] == "overloaded_error"

    in_server(test, patience_s=0.05)


def test_a_stream_that_waits_is_kept_open_by_pings() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        body = {"model": "base", "messages": [USER], "max_tokens": 9, "stream": True}
        client = Client(server.api, "POST", MESSAGES, json.dumps(body).encode())
        await until(lambda: client.answered.body.count(b"event: ping\n") == 2)
        server.engine.running.set()
        await client.done
        names = [name for name, _ in named_events(client.answered)]
        assert names[:2] == ["ping", "ping"] and names[-1] == "message_stop"

    settings = IngressSection(max_body_bytes=2**20, keep_alive_s=0.02)
    in_server(test, ingress_settings=settings)
