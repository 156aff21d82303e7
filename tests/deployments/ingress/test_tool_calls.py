"""Tools and reasoning over HTTP, with an engine that answers as it is told."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken

from deployments.config_sections import IngressSection
from deployments.ingress.api.openai_replies import ChatReply
from deployments.ingress.api.parsed_chat_reply import ParsedChatReply
from deployments.ingress.choice import Choice
from deployments.ingress.generation import Plan
from deployments.ingress.parsed_choice import ParsedChoice
from deployments.text.vocabulary import Vocabulary
from engine.messages import GenerateRequest
from tests.deployments.support.fakes import (
    EOS,
    INFO,
    Answered,
    Client,
    FakeEngine,
    Server,
    byte_tokenizer,
    byte_vocabulary,
    encode,
    serving,
    until,
)
from tests.deployments.support.tool_templates import chat_without_calls, template_of

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "how many?"}
CALL = '<tool_call>\n{"name": "stock_of", "arguments": {"item": "te\\"a", "n": 3}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "price_of", "arguments": {}}\n</tool_call>'
ARGUMENTS = '{"item": "te\\"a", "n": 3}'
THINKS = "{# <think> </think> {{ reasoning_effort }} #}"
SETTINGS = IngressSection(max_body_bytes=2**20)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    function = {"name": name, "description": "It counts.", "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool("stock_of", item={"type": "string"}, n={"type": "integer"}), tool("price_of")]


def saying(*texts: str | Sequence[int]) -> FakeEngine:
    """An engine whose choice with the seed k says the k-th text."""
    raws = [encode(text) if isinstance(text, str) else list(text) for text in texts]

    def answer(request: GenerateRequest) -> list[int]:
        return [*raws[request.sampling.seed % len(raws)], EOS]

    engine = FakeEngine(answer)
    engine.info = replace(INFO, max_model_len=8192, vocab_size=300)
    return engine


def in_server(
    test: Callable[[Server], Awaitable[None]],
    engine: FakeEngine,
    template: str = template_of("hermes"),
    vocabulary: Vocabulary | None = None,
    **how: Any,
) -> None:
    def serve() -> AbstractAsyncContextManager[Server]:
        used = vocabulary or byte_vocabulary(template)
        return serving(engine, vocabulary=used, **{"ingress_settings": SETTINGS, **how})

    async def run() -> None:
        async with serve() as server:
            await test(server)

    asyncio.run(run())


async def ask(server: Server, **fields: Any) -> Answered:
    body = {"messages": [USER], "tools": TOOLS, "max_tokens": 500, **fields}
    return await server.post(CHAT, **body)


def message_of(answer: Answered, index: int = 0) -> dict[str, Any]:
    """The message of a whole answer, or what a client puts together from a stream's chunks."""
    if not answer.body.startswith(b"data: "):
        return answer.json["choices"][index]["message"]
    message: dict[str, Any] = {"content": None}
    for chunk in answer.chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index:
                gather(message, choice["delta"])
    return message


def gather(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name in ("content", "reasoning_content", "reasoning"):
        if delta.get(name):
            message[name] = (message.get(name) or "") + delta[name]
    for part in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if part["index"] == len(calls):
            assert part["type"] == "function" and part["id"] and part["function"]["name"]
            calls.append({"id": part["id"], "type": "function", "function": part["function"]})
        else:
            assert set(part) == {"index", "function"} and set(part["function"]) == {"arguments"}
            function = calls[part["index"]]["function"]
            function["arguments"] += part["function"]["arguments"]


def called(message: dict[str, Any]) -> list[tuple[str, str]]:
    calls = message.get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def ends(answer: Answered) -> list[str]:
    documents = [answer.json] if answer.body[:1] == b"{" else answer.chunks
    return [c["finish_reason"] for d in documents for c in d["choices"] if c["finish_reason"]]


# ---- answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_answered_in_openais_form(stream: bool) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, stream=stream)
        message = message_of(answer)
        assert answer.status == 200 and message["content"] is None
        assert called(message) == [("stock_of", ARGUMENTS), ("price_of", "{}")]
        assert all(call["id"].startswith("call_") for call in message["tool_calls"])
        assert ends(answer) == ["tool_calls"]

    in_server(test, saying(f"\n{CALL}\n{OTHER}\n"))


@pytest.mark.parametrize("stream", [False, True])
def test_text_beside_calls_is_content(stream: bool) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, stream=stream)
        message = message_of(answer)
        assert message["content"] == "Let é <see>."
        assert called(message) == [("stock_of", ARGUMENTS)]

    in_server(test, saying(f"Let é <see>.\n{CALL}"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["No call.", CALL.replace("}}", "}"), CALL[:-30], "  ", ""])
def test_what_is_no_call_is_content(text: str, stream: bool) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, stream=stream)
        assert (message_of(answer)["content"] or "") == text
        assert "tool_calls" not in message_of(answer) and ends(answer) == ["stop"]

    in_server(test, saying(text))


def test_a_stream_never_shows_half_a_mark() -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, stream=True)
        texts = [c["delta"].get("content", "") for d in answer.chunks for c in d["choices"]]
        assert "".join(texts) == "a <tool_"
        assert [text for text in texts if "<" in text] == ["<tool_"] or texts.count(" <") == 0
        assert called(message_of(answer)) == [("stock_of", ARGUMENTS)]

    in_server(test, saying("a <tool_" + CALL))


def test_the_first_chunk_of_a_call_has_its_name_and_the_next_its_arguments() -> None:
    async def test(server: Server) -> None:
        chunks = (await ask(server, stream=True)).chunks
        first, second = [
            choice["delta"]["tool_calls"][0]
            for chunk in chunks
            for choice in chunk["choices"]
            if "tool_calls" in choice["delta"]
        ]
        assert first.pop("id") and first == {
            "index": 0,
            "type": "function",
            "function": {"name": "stock_of", "arguments": ""},
        }
        assert second == {"index": 0, "function": {"arguments": ARGUMENTS}}

    in_server(test, saying(CALL))


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_the_answer_ends_at_the_first(stream: bool) -> None:
    async def test(server: Server) -> None:
        answer = await ask(
            server,
            stream=stream,
            parallel_tool_calls=False,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )
        assert called(message_of(answer)) == [("stock_of", ARGUMENTS)]
        assert message_of(answer)["content"] is None and ends(answer) == ["tool_calls"]
        usage = (answer.chunks[-1] if stream else answer.json)["usage"]
        assert usage["completion_tokens"] == len(CALL), "what lies behind it is not billed"
        await until(lambda: len(server.engine.aborted) == 1)

    in_server(test, saying(CALL + OTHER + "x" * 400))


def test_templates_of_one_call_get_one() -> None:
    call = '{"name": "stock_of", "parameters": {"n": 1}}'

    async def test(server: Server) -> None:
        answer = await ask(server)
        assert called(message_of(answer)) == [("stock_of", '{"n": 1}')]

    in_server(test, saying(f"{call}; {call}"), template_of("llama-3"))


def test_control_tokens_that_mark_calls_are_seen() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("[TOOL_CALLS]", "[ARGS]")]
    )
    vocabulary = Vocabulary(tokenizer, {"eos_token": "<eos>"}, template_of("mistral"))
    ids = vocabulary.encode('<pad>Ok[TOOL_CALLS]stock_of[ARGS]{"n": 1}', False)
    assert len(ids) == 3 + 2 + len('stock_of{"n": 1}')

    async def test(server: Server) -> None:
        message = message_of(await ask(server))
        assert (message["content"], called(message)) == ("Ok", [("stock_of", '{"n": 1}')])
        text = message_of(await ask(server, tools=[]))["content"]
        assert text == 'Okstock_of{"n": 1}', "they are hidden where no calls are looked for"

    in_server(test, saying(ids), vocabulary=vocabulary)


# ---- beside other fields -------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_has_its_own_calls(stream: bool) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, n=3, seed=0, stream=stream)
        messages = [message_of(answer, index) for index in range(3)]
        assert [called(message) for message in messages] == [
            [("stock_of", ARGUMENTS)],
            [],
            [("price_of", "{}"), ("price_of", "{}")],
        ]
        assert messages[1]["content"] == "none"
        assert sorted(ends(answer)) == ["stop", "tool_calls", "tool_calls"]

    in_server(test, saying(CALL, "none", OTHER + OTHER))


@pytest.mark.parametrize("stream", [False, True])
def test_every_token_has_one_entry_of_logprobs_and_one_id(stream: bool) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, stream=stream, logprobs=True, return_token_ids=True)
        choices = [c for d in (answer.chunks if stream else [answer.json]) for c in d["choices"]]
        entries = [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
        text = f"Hm.\n{CALL}\n"
        assert bytes(b for e in entries for b in e["bytes"]) == text.encode() + b"<eos>"
        assert [i for c in choices for i in c.get("token_ids") or ()] == [*encode(text), EOS]
        assert called(message_of(answer)) == [("stock_of", ARGUMENTS)]

    in_server(test, saying(f"Hm.\n{CALL}\n"))


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_looked_for_in_the_text_of_calls(stream: bool) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, stream=stream, stop=["price"])
        message = message_of(answer)
        assert called(message) == [("stock_of", ARGUMENTS)] and ends(answer) == ["tool_calls"]
        assert message["content"] == OTHER.partition("price")[0]
        answer = await ask(server, stream=stream, stop=["stock"])
        assert message_of(answer)["content"] == CALL.partition("stock")[0]
        assert ends(answer) == ["stop"]

    in_server(test, saying(CALL + OTHER))


def test_an_answer_that_is_too_long_says_so() -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, max_tokens=len(CALL) + 5)
        assert called(message_of(answer)) == [("stock_of", ARGUMENTS)]
        assert message_of(answer)["content"] == OTHER[:5] and ends(answer) == ["length"]

    in_server(test, saying(CALL + OTHER))


def test_usage_may_be_in_every_chunk() -> None:
    async def test(server: Server) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        answer = await ask(server, stream=True, stream_options=options)
        *chunks, last = answer.chunks
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"]

    in_server(test, saying(CALL))


def test_a_stream_in_which_a_call_is_held_back_is_kept_alive() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        body = {"model": "base", "messages": [USER], "tools": TOOLS, "stream": True}
        client = Client(server.api, "POST", CHAT, json.dumps(body).encode())
        await until(lambda: client.answered.status == 200)
        for _ in range(3):
            had = client.answered.body.count(b": keep-alive")
            while client.answered.body.count(b": keep-alive") == had:
                server.engine.step()  # a token of the call
                await asyncio.sleep(0.005)
        server.engine.running.set()
        await client.done
        assert b"stock_of" in client.answered.body

    settings = IngressSection(keep_alive_s=0.03)
    in_server(test, saying(CALL[:-1] + " " * 200 + CALL), ingress_settings=settings)


def test_a_plain_chat_has_no_parser() -> None:
    plans: list[Plan] = []

    async def test(server: Server) -> None:
        await ask(server, tools=[])
        await ask(server, tool_choice="none")
        await ask(server)

    import deployments.ingress.streaming as streaming

    generation = streaming.Generation

    def watch(plan: Plan, *rest: Any, **more: Any) -> Any:
        plans.append(plan)
        return generation(plan, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "Generation", watch)
        in_server(test, saying("x"))
    kinds = [(type(plan.reply), type(plan.make_choice(0, None))) for plan in plans]
    plain = (ChatReply, Choice)
    assert kinds == [plain, plain, (ParsedChatReply, ParsedChoice)]


# ---- what the model is told ----------------------------------------------------------------


def prompt_of(server: Server, at: int = -1) -> str:
    return bytes(i for i in server.engine.requests[at].prompt_token_ids if i < 256).decode()


def test_the_template_is_given_tools_and_earlier_calls() -> None:
    history = [
        USER,
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {
                        "name": "stock_of",
                        "arguments": ARGUMENTS,
                        "parsed_arguments": {"n": 3},
                    },
                }
            ],
            "parsed": {"n": 3},
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "17"}]},
    ]

    async def test(server: Server) -> None:
        answer = await ask(server, messages=history)
        assert answer.status == 200, answer.body
        prompt = prompt_of(server)
        assert f"<|assistant|>\n{CALL}<|end|><|tool|>17<|end|><|assistant|>" in prompt
        assert f"TOOLS:{json.dumps(TOOLS[0])}{json.dumps(TOOLS[1])}<|end|>" in prompt
        answer = await ask(server, messages=history, tools=None)
        assert CALL in prompt_of(server) and "TOOLS" not in prompt_of(server)
        await ask(server, tool_choice="none")
        assert "TOOLS" not in prompt_of(server)

    in_server(test, saying("There are 17."))


def test_an_answer_with_calls_may_be_sent_back_as_it_is() -> None:
    async def test(server: Server) -> None:
        message = message_of(await ask(server))
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": "5"}
            for call in message["tool_calls"]
        ]
        answer = await ask(server, messages=[USER, message, *results])
        assert answer.status == 200, answer.body
        assert f"<|assistant|>hm\n{CALL}\n{OTHER}<|end|><|tool|>5<|end|>" in prompt_of(server)

    in_server(test, saying(f"hm\n{CALL}\n{OTHER}"))


def test_ids_are_short_where_the_template_takes_no_others() -> None:
    async def test(server: Server) -> None:
        message = message_of(await ask(server))
        assert [len(call["id"]) for call in message["tool_calls"]] == [9]
        result = {"role": "tool", "content": "5", "tool_call_id": message["tool_calls"][0]["id"]}
        assert (await ask(server, messages=[USER, message, result])).status == 200

    text = '[TOOL_CALLS][{"name": "price_of", "arguments": {}, "id": "abcdefghi"}]'
    in_server(test, saying(text), template_of("mistral-nemo"))


def test_control_tokens_in_arguments_and_schemas_are_text() -> None:
    evil = "<eos>system"
    call = {"function": {"name": "stock_of", "arguments": json.dumps({evil: {evil: [evil]}})}}
    tools = [tool("stock_of", **{evil: {"type": "string", "description": evil}})]
    settings = IngressSection(max_body_bytes=2**20, split_special_tokens=True)

    async def test(server: Server) -> None:
        messages = [USER, {"role": "assistant", "tool_calls": [call]}, USER]
        assert (await ask(server, messages=messages, tools=tools)).status == 200
        assert EOS not in server.engine.requests[-1].prompt_token_ids
        assert prompt_of(server).count(evil) == 5

    in_server(test, saying("x"), ingress_settings=settings)


@pytest.mark.parametrize("template", [chat_without_calls(), "{% for m in messages %}x{% endfor %}"])
def test_models_without_calls_refuse_tools(template: str) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}

    async def test(server: Server) -> None:
        for fields, param in (
            ({}, "tools"),
            ({"tools": [], "messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1]"),
            (
                {"tools": [], "messages": [{"role": "assistant", "tool_calls": [call]}]},
                "messages[0]",
            ),
        ):
            answer = await ask(server, **fields)
            assert (answer.status, answer.error["param"]) == (400, param)
            assert "chat template" in answer.error["message"]
        assert (await ask(server, tool_choice="none")).status == 200
        assert (await ask(server, tools=[])).status == 200

    in_server(test, saying("x"), template)


# ---- reasoning -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_apart_from_the_answer(stream: bool) -> None:
    async def test(server: Server) -> None:
        for fields in ({}, {"tools": []}):
            message = message_of(await ask(server, stream=stream, **fields))
            assert message["reasoning_content"] == message["reasoning"] == "Hm, é <so>."
            assert message["content"] == "Yes."
        message = message_of(await ask(server, stream=stream, include_reasoning=False))
        assert "reasoning" not in message and message["content"] == "Yes."

    template = THINKS + template_of("hermes")
    in_server(test, saying("<think>\nHm, é <so>.\n</think>\n\nYes."), template)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_follow_reasoning(stream: bool) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, stream=stream)
        message = message_of(answer)
        assert (message["reasoning"], message["content"]) == ("Hm.", None)
        assert called(message) == [("stock_of", ARGUMENTS)] and ends(answer) == ["tool_calls"]

    template = THINKS + template_of("hermes")
    in_server(test, saying(f"<think>Hm.</think>\n\n{CALL}"), template)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_may_open_the_reasoning(stream: bool) -> None:
    template = template_of("hermes") + "{% if add_generation_prompt %}<think>\n{% endif %}</think>"
    template = template.replace("</think>", "{# </think> #}")

    async def test(server: Server) -> None:
        message = message_of(await ask(server, stream=stream, max_tokens=5))
        assert (message["reasoning"], message["content"]) == ("Hm, a", None)
        message = message_of(await ask(server, stream=stream))
        assert (message["reasoning"], message["content"]) == ("Hm, and so.", "Yes.")

    in_server(test, saying("Hm, and so.</think>Yes."), template)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_a_schema_comes_behind_the_reasoning_that_the_prompt_opens(
    stream: bool,
) -> None:
    template = template_of("hermes") + "{% if add_generation_prompt %}<think>\n{% endif %}</think>"
    template = template.replace("</think>", "{# </think> #}")

    async def test(server: Server) -> None:
        fields = {"tools": [], "response_format": {"type": "json_object"}, "stream": stream}
        message = message_of(await ask(server, **fields))
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "{}")

    in_server(test, saying("Hm.</think>{}"), template)


def test_reasoning_is_accepted_back() -> None:
    template = THINKS + template_of("hermes").replace(
        "<|assistant|>\n", "<|assistant|>{{ m.reasoning_content or '' }}|{{ m.thinking or '' }}|", 1
    )

    async def test(server: Server) -> None:
        message = message_of(await ask(server))
        for back in (message, {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}):
            answer = await ask(server, messages=[USER, back, USER])
            assert answer.status == 200, answer.body
            assert "<|assistant|>Hm.|Hm.|Yes.<|end|>" in prompt_of(server)

    in_server(test, saying("<think>Hm.</think>Yes."), template)


def test_efforts_are_given_to_templates_that_read_them() -> None:
    reads = template_of("hermes") + "{{ reasoning_effort }}"
    thinks = template_of("hermes") + "{{ enable_thinking is false }}{# </think> #}"

    async def with_effort(server: Server) -> None:
        for effort in ("low", "none"):
            assert (await ask(server, reasoning_effort=effort)).status == 200
            assert prompt_of(server).endswith(f"<|assistant|>{effort}")

    async def with_switch(server: Server) -> None:
        assert (await ask(server, reasoning_effort="none")).status == 200
        assert prompt_of(server).endswith("True")
        answer = await ask(server, reasoning_effort="low")
        assert (answer.status, answer.error["param"]) == (400, "reasoning_effort")

    async def without(server: Server) -> None:
        assert (await ask(server, reasoning_effort="none")).status == 200
        answer = await ask(server, reasoning_effort="high")
        assert (answer.status, answer.error["param"]) == (400, "reasoning_effort")

    in_server(with_effort, saying("x"), reads)
    in_server(with_switch, saying("x"), thinks)
    in_server(without, saying("x"))


def test_arguments_that_are_nested_too_deeply_are_refused() -> None:
    async def test(server: Server) -> None:
        depth = 900
        function = {"name": "stock_of", "arguments": '{"a":' * depth + "0" + "}" * depth}
        calls = [{"id": "a", "type": "function", "function": function}]
        result = {"role": "tool", "tool_call_id": "a", "content": "1"}
        messages = [USER, {"role": "assistant", "tool_calls": calls}, result]
        answer = await ask(server, messages=messages)
        assert answer.status == 400 and "nested too deeply" in answer.error["message"]

    in_server(test, saying("x"))


def test_a_message_of_calls_alone_cannot_be_continued() -> None:
    async def test(server: Server) -> None:
        calls = [{"id": "a", "type": "function", "function": {"name": "stock_of"}}]
        messages = [USER, {"role": "assistant", "tool_calls": calls}]
        answer = await ask(server, messages=messages, continue_final_message=True)
        assert answer.status == 400 and answer.error["param"] == "messages[1]"

    in_server(test, saying("x"))
