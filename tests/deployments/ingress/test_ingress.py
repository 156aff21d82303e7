"""The HTTP interfaces end to end in one process, with an engine that answers in capitals."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import processors

from adapter_store.verdict import Verdict
from deployments.config_sections import IngressSection
from deployments.ingress import prompt_texts, request_body
from deployments.text.vocabulary import Vocabulary
from engine.messages import ErrorKind, GenerateRequest, RequestError, RequestOutput
from engine.scheduler.request import SamplingDefaults
from tests.deployments.support.fakes import (
    EOS,
    INFO,
    Client,
    FakeEngine,
    Server,
    byte_tokenizer,
    call,
    encode,
    serving,
    until,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def in_server(
    test: Callable[[Server], Awaitable[None]],
    serve: Callable[[], AbstractAsyncContextManager[Server]] = serving,
) -> None:
    async def run() -> None:
        async with serve() as server:
            await test(server)

    asyncio.run(run())


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def saying(text: str | bytes) -> FakeEngine:
    raw = text.encode() if isinstance(text, str) else text
    return FakeEngine(lambda request: [*raw, EOS])


# ---- answers -------------------------------------------------------------------------------


def test_a_chat_answers_with_text_and_usage() -> None:
    async def test(server: Server) -> None:
        server.engine.drafted = (5, 3)
        answer = await server.post(CHAT, messages=user("hi"), max_tokens=50)
        assert answer.status == 200
        choice = answer.json["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": "USER:HI;", "refusal": None}
        assert choice["finish_reason"] == "stop"
        usage = answer.json["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
            8,
            9,
            17,
        )
        assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
        assert usage["completion_tokens_details"] == {
            "accepted_prediction_tokens": 3,
            "rejected_prediction_tokens": 2,
        }

    in_server(test)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_the_same_as_the_whole(path: str, n: int) -> None:
    async def test(server: Server) -> None:
        prompt: dict[str, Any] = {"messages": user("hé€")} if path == CHAT else {"prompt": "hé€"}
        whole = await server.post(path, **prompt, n=n)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        stream = await server.post(path, **prompt, n=n, **options)
        assert stream.headers["content-type"].startswith("text/event-stream")
        for index, choice in enumerate(whole.json["choices"]):
            text = choice["message"]["content"] if path == CHAT else choice["text"]
            assert stream.text(index) == text
        chunks = stream.chunks
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole.json["usage"]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        ends = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
        assert [end for end in ends if end] == [c["finish_reason"] for c in whole.json["choices"]]
        assert len({chunk["id"] for chunk in chunks}) == 1

    in_server(test)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_chunk_may_have_the_usage_so_far(path: str) -> None:
    async def test(server: Server) -> None:
        prompt: dict[str, Any] = {"messages": user("abc")} if path == CHAT else {"prompt": "abc"}
        options = {"include_usage": True, "continuous_usage_stats": True}
        answer = await server.post(path, **prompt, stream=True, stream_options=options)
        *chunks, last = answer.chunks
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"]
        assert {c["usage"]["prompt_tokens"] for c in chunks} == {last["usage"]["prompt_tokens"]}

    in_server(test)


def test_the_first_chat_chunk_has_the_role() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(CHAT, messages=user("hi"), stream=True)
        assert answer.chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "usage" not in answer.chunks[0]

    in_server(test)


def test_an_answer_that_is_cut_off_says_length() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="abcdef", max_tokens=3)
        assert answer.json["choices"][0] | {"logprobs": None} == {
            "index": 0,
            "text": "ABC",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }

    in_server(test)


def test_several_prompts_are_numbered_one_after_the_other() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt=["a", "bc"], n=2, return_token_ids=True)
        choices = answer.json["choices"]
        assert [(c["index"], c["text"]) for c in choices] == [
            (0, "A"),
            (1, "A"),
            (2, "BC"),
            (3, "BC"),
        ]
        assert [c["prompt_token_ids"] for c in choices] == [[97], [97], [98, 99], [98, 99]]
        assert choices[3]["token_ids"] == [66, 67, EOS]
        assert answer.json["usage"]["prompt_tokens"] == 3
        seeds = [request.sampling.seed for request in server.engine.requests]
        assert len(set(seeds)) == 2, "prompts of one request must not share random numbers"

    in_server(test)


@pytest.mark.parametrize("prompt", [[104, 105], [[104, 105]]])
def test_a_prompt_of_token_ids_goes_to_the_engine_as_it_is(prompt: list[Any]) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt=prompt)
        assert answer.json["choices"][0]["text"] == "HI"
        assert server.engine.requests[0].prompt_token_ids == [104, 105]

    in_server(test)


def test_a_seed_of_the_client_is_used_for_every_prompt() -> None:
    async def test(server: Server) -> None:
        await server.post(COMPLETIONS, prompt=["a", "b"], seed=5)
        assert [request.sampling.seed for request in server.engine.requests] == [5, 5]

    in_server(test)


def test_a_seed_of_minus_one_is_drawn_anew_for_every_prompt() -> None:
    async def test(server: Server) -> None:
        await server.post(COMPLETIONS, prompt=["a", "b"], seed=-1)
        await server.post(COMPLETIONS, prompt="a", seed=-1)
        seeds = [request.sampling.seed for request in server.engine.requests]
        assert len(set(seeds)) == 3 and -1 not in seeds

    in_server(test)


def test_what_a_request_leaves_out_is_as_the_models_makers_recommend() -> None:
    defaults = SamplingDefaults(0.6, 0.9, 20, repetition_penalty=1.05)
    engine = FakeEngine()
    engine.info = replace(INFO, sampling_defaults=defaults)

    async def test(server: Server) -> None:
        await server.post(COMPLETIONS, prompt="a")
        await server.post(COMPLETIONS, prompt="a", temperature=0, top_k=-1, repetition_penalty=1)
        used, chosen = (request.sampling for request in server.engine.requests)
        assert (used.temperature, used.top_p, used.top_k) == (0.6, 0.9, 20)
        assert (used.min_p, used.repetition_penalty) == (0.0, 1.05)
        assert (chosen.temperature, chosen.top_p, chosen.top_k) == (0, 0.9, 0)
        assert chosen.repetition_penalty == 1

    in_server(test, lambda: serving(engine))


# ---- stop strings --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it_and_frees_the_engine(stream: bool) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(
            COMPLETIONS,
            prompt="x",
            stop=["lo w", "never"],
            stream=stream,
            max_tokens=50,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )
        text = answer.text() if stream else answer.json["choices"][0]["text"]
        usage = answer.chunks[-1]["usage"] if stream else answer.json["usage"]
        assert text == "hel"
        assert usage["completion_tokens"] == len("hello w"), "what lies behind it is not billed"
        await until(lambda: len(server.engine.aborted) == 1)

    in_server(test, lambda: serving(saying("hello world, and so on")))


def test_a_held_back_beginning_of_a_stop_string_is_shown_in_the_end() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(
            COMPLETIONS, prompt="x", stop="world!", stream=True, max_tokens=50
        )
        assert answer.text() == "hello world"

    in_server(test, lambda: serving(saying("hello world")))


def test_min_tokens_come_before_any_stop_string() -> None:
    async def test(server: Server) -> None:
        extras = {"stop": "a", "include_stop_str_in_output": True, "max_tokens": 50}
        answer = await server.post(COMPLETIONS, prompt="x", min_tokens=3, **extras)
        assert answer.json["choices"][0]["text"] == "aba"

    in_server(test, lambda: serving(saying("ababababa")))


def test_one_choice_at_its_stop_string_leaves_the_others_alone() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt=["aSb", "acb"], stop="S", stream=True)
        assert (answer.text(0), answer.text(1)) == ("A", "ACB")
        ends = [c["index"] for e in answer.chunks for c in e["choices"] if c["finish_reason"]]
        assert sorted(ends) == [0, 1], "each choice ends once"

    in_server(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_at_its_stop_string_stops_in_the_engine(stream: bool) -> None:
    """Choices 1 and 2 end early, and the engine computes the other one alone to its end."""

    def answer(request: GenerateRequest) -> list[int]:
        text = {1: "abS", 2: "cS"}.get(request.sampling.seed % 3, "y" * 30)
        return [*encode(text), *encode("z" * 50)]

    async def test(server: Server) -> None:
        reply = await server.post(
            COMPLETIONS, prompt="x", n=3, seed=0, stop="S", stream=stream, max_tokens=60
        )
        if not stream:
            texts = [choice["text"] for choice in reply.json["choices"]]
            assert texts == ["y" * 30 + "z" * 30, "ab", "c"]
        assert sorted(index for _, index in server.engine.aborted_choices) == [1, 2]
        assert server.engine.stats.num_running == 0
        await until(lambda: not server.engine._live)

    in_server(test, lambda: serving(FakeEngine(answer)))


def test_prompts_share_no_end() -> None:
    """Each prompt is a request of its own, which ends with its only choice."""

    async def test(server: Server) -> None:
        await server.post(COMPLETIONS, prompt=["aS" + "b" * 58, "c" * 60], stop="S", max_tokens=60)
        await until(lambda: len(server.engine.aborted) == 1)
        assert server.engine.aborted_choices == []

    in_server(test)


@pytest.mark.parametrize("n", [1, 3])
def test_cached_tokens_are_those_of_the_prompts(n: int) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt=["abc", "abcd"], n=n)
        assert answer.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}

    in_server(test)


def test_characters_are_whole_in_every_chunk() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="x", stream=True, max_tokens=50)
        assert answer.text() == "a€😀é"
        assert "\ufffd" not in answer.body.decode()

    in_server(test, lambda: serving(saying("a€😀é")))


def test_a_character_that_never_ends_is_shown_as_broken() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="x", stream=True, max_tokens=50)
        assert answer.text() == "a\ufffd"

    in_server(test, lambda: serving(saying(b"a\xe2\x82")))


# ---- logprobs and echo ---------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_have_one_entry_per_token(stream: bool) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(
            CHAT, messages=user("x"), logprobs=True, top_logprobs=2, max_tokens=50, stream=stream
        )
        chunks = answer.chunks if stream else [answer.json]
        choices = [c for chunk in chunks for c in chunk["choices"]]
        entries = [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
        assert bytes(b for e in entries for b in e["bytes"]) == "é!".encode() + b"<eos>"
        assert all(e["logprob"] == -0.5 and len(e["top_logprobs"]) == 2 for e in entries)
        assert entries[2]["top_logprobs"][1]["token"] == '"'

    in_server(test, lambda: serving(saying("é!")))


def test_completion_logprobs_have_offsets_into_the_text() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="ab", logprobs=1, echo=True)
        choice = answer.json["choices"][0]
        assert choice["text"] == "abAB"
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == ["a", "b", "A", "B", "<eos>"]
        assert logprobs["token_logprobs"] == [None, -2.0, -0.5, -0.5, -0.5]
        assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["top_logprobs"][2] == {"A": -0.5}

    in_server(test)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("prompt", "text", "offsets"),
    [
        ([97, EOS, 98], "a<eos>bAB", [0, 1, 6, 7, 8, 9]),
        ([EOS, 97, 98], "<eos>abAB", [0, 5, 6, 7, 8, 9]),
        ("ab<eos>c", "ab<eos>cABC", [0, 1, 2, 7, 8, 9, 10, 11]),
        ("<eos>a", "<eos>aA", [0, 5, 6, 7]),
    ],
)
def test_offsets_of_an_echo_are_those_of_its_text(
    prompt: Any, text: str, offsets: list[int], skip: bool
) -> None:
    async def test(server: Server) -> None:
        fields = {"prompt": prompt, "echo": True, "logprobs": 0, "skip_special_tokens": skip}
        choice = (await server.post(COMPLETIONS, **fields)).json["choices"][0]
        assert choice["text"].removesuffix("<eos>") == text
        assert choice["logprobs"]["text_offset"] == offsets

    in_server(test)


def test_offsets_of_an_echo_leave_out_the_tokens_that_were_added() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 257)]
    )

    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="ab", echo=True, logprobs=0)
        choice = answer.json["choices"][0]
        assert server.engine.requests[0].prompt_token_ids == [257, 97, 98]
        assert (choice["text"], choice["logprobs"]["text_offset"]) == ("abAB", [0, 0, 1, 2, 3, 4])

    vocabulary = Vocabulary(tokenizer, {"eos_token": "<eos>", "bos_token": "<pad>"}, None)
    in_server(test, lambda: serving(vocabulary=vocabulary))


def test_echo_of_every_choice_begins_with_its_prompt() -> None:
    async def test(server: Server) -> None:
        fields = {"prompt": ["a", "b"], "n": 2, "echo": True, "logprobs": 0}
        answer = await server.post(COMPLETIONS, **fields, stream=True)
        assert [answer.text(index) for index in range(4)] == ["aA", "aA", "bB", "bB"]
        whole = (await server.post(COMPLETIONS, **fields)).json
        assert all(c["logprobs"]["token_logprobs"][0] is None for c in whole["choices"])

    in_server(test)


def test_no_tokens_and_an_echo_score_the_prompt_alone() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="abc", max_tokens=0, echo=True, logprobs=0)
        choice = answer.json["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
        assert choice["logprobs"]["token_logprobs"] == [None, -2.0, -2.0]
        assert answer.json["usage"]["completion_tokens"] == 0

    in_server(test)


def test_token_ids_in_a_stream_add_up() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(CHAT, messages=user("é"), return_token_ids=True, stream=True)
        chunks = answer.chunks
        ids = [i for chunk in chunks for c in chunk["choices"] for i in c.get("token_ids", ())]
        assert bytes(ids[:-1]).decode() == answer.text() and ids[-1] == EOS
        assert chunks[0]["prompt_token_ids"] == server.engine.requests[0].prompt_token_ids

    in_server(test)


# ---- models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["red", "red@1", "red@latest", "base:red", "public/red"])
def test_an_adapter_can_be_named_in_several_ways(name: str) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, model=name, prompt="x")
        assert answer.json["choices"][0]["text"] == "red:X"
        assert answer.json["model"] == name
        await until(lambda: server.store.pins == {"red-digest": 0})

    in_server(test)


@pytest.mark.parametrize("name", ["green", "red@2", "other/red", "other:red", "", "../red", "Base"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_unknown_model_is_404_and_never_the_base(name: str, path: str) -> None:
    async def test(server: Server) -> None:
        prompt = {"messages": user("x")} if path == CHAT else {"prompt": "x"}
        answer = await server.post(path, **{"model": name, **prompt})
        assert answer.status == 404
        assert answer.error["code"] == "model_not_found" and answer.error["param"] == "model"
        assert server.engine.requests == []

    in_server(test)


def test_models_are_listed_with_their_parents() -> None:
    async def test(server: Server) -> None:
        listed = (await server.call("GET", "/v1/models")).json["data"]
        assert [(card["id"], card["parent"]) for card in listed] == [
            ("base", None),
            ("blue", "base"),
            ("red", "base"),
        ]
        assert listed[0]["max_model_len"] == INFO.max_model_len
        assert listed[2]["root"] == "red-digest"
        for name in ("base", "red@1", "public/red", "base:red"):
            card = (await server.call("GET", f"/v1/models/{name}")).json
            assert (card["id"], card["object"]) == (name, "model")
        assert (await server.call("GET", "/v1/models/a/b/c")).status == 404

    in_server(test)


def test_models_say_whether_an_engine_has_seen_them_act() -> None:
    async def test(server: Server) -> None:
        verdict = Verdict("failed", "p", "int8, torch", 1.0, 0.9, 0.2, "does not act", 5.5)
        server.store.verdicts["red"] = verdict
        listed = (await server.call("GET", "/v1/models")).json["data"]
        proofs = {card["id"]: card.get("proof") for card in listed}
        assert proofs["base"] is None and proofs["blue"] == {"status": "not_yet"}
        assert proofs["red"] == {
            "status": "failed",
            "at": 5,
            "probe": "p",
            "engine": "int8, torch",
            "effect": 1.0,
            "error": 0.9,
            "margin": 0.2,
            "reason": "does not act",
        }
        assert (await server.call("GET", "/v1/models/red@1")).json["proof"] == proofs["red"]

    in_server(test)


@pytest.mark.parametrize("name", ["base", "red", "red@1", "public/red"])
def test_a_model_was_created_when_the_list_says_so(name: str) -> None:
    async def test(server: Server) -> None:
        listed = (await server.call("GET", "/v1/models")).json["data"]
        by_id = {card["id"]: card["created"] for card in listed}
        wanted = by_id["base" if name == "base" else "red"]
        assert (await server.call("GET", f"/v1/models/{name}")).json["created"] == wanted

    in_server(test)


def test_an_adapter_of_another_base_is_not_found() -> None:
    async def test(server: Server) -> None:
        ref = server.store.refs["red"]
        server.store.refs["red"] = type(ref)(ref.tenant, ref.name, 1, ref.digest, "another base")
        assert (await server.post(COMPLETIONS, model="red", prompt="x")).status == 404

    in_server(test)


# ---- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, ["empty"]),
        ({"prompt": [[]]}, ["empty"]),
        ({"prompt": "x" * 128}, ["128"]),
        ({"prompt": "x" * 100, "max_tokens": 29}, ["100", "29", "128"]),
        ({"prompt": [3, 258]}, ["258", "0..257"]),
        ({"prompt": [-1]}, ["-1", "0..257"]),
        ({"prompt": "x", "stop_token_ids": [999]}, ["999"]),
        ({"prompt": "x", "logit_bias": {"999": 1}}, ["999"]),
        ({"prompt": "x", "max_tokens": -1}, ["-1"]),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_with_the_limits(
    fields: dict[str, Any], words: list[str]
) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, **fields)
        assert answer.status == 400
        assert all(word in answer.error["message"] for word in words), answer.error

    in_server(test)


def test_a_text_that_cannot_fit_is_refused_by_its_length() -> None:
    async def test(server: Server) -> None:
        longest = INFO.max_model_len * len("<eos>")
        for path, prompt in (
            (COMPLETIONS, {"prompt": "x" * 700}),
            (CHAT, {"messages": user("x" * 700)}),
        ):
            answer = await server.post(path, **prompt)
            assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
            assert (
                "700 bytes" in answer.error["message"] and str(longest) in answer.error["message"]
            )

    in_server(test)


def test_a_long_text_is_encoded_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(server: Server) -> None:
        prompts = ["a" * 60, "b" * 60]
        inline = await server.post(COMPLETIONS, prompt=prompts)
        monkeypatch.setattr(prompt_texts, "LONG_TEXT", 100)
        monkeypatch.setattr(Vocabulary, "encode", None)
        aside = await server.post(COMPLETIONS, prompt=prompts)
        assert [c["text"] for c in aside.json["choices"]] == [
            c["text"] for c in inline.json["choices"]
        ]
        refused = await server.post(COMPLETIONS, prompt=["a", "b" * 129])
        assert refused.status == 400 and "129 tokens" in refused.error["message"]

    in_server(test)


@pytest.mark.parametrize("split", [True, False])
def test_control_tokens_in_messages_are_text_where_the_config_says_so(split: bool) -> None:
    async def test(server: Server) -> None:
        await server.post(CHAT, messages=user("<eos>"))
        assert (EOS in server.engine.requests[0].prompt_token_ids) is not split
        await server.post(COMPLETIONS, prompt="<eos>x")
        assert server.engine.requests[1].prompt_token_ids == [EOS, 120]

    settings = IngressSection(split_special_tokens=split)
    in_server(test, lambda: serving(ingress_settings=settings))


def test_a_final_message_can_be_continued() -> None:
    async def test(server: Server) -> None:
        messages = [*user("hi"), {"role": "assistant", "content": "Well"}]
        await server.post(CHAT, messages=messages, continue_final_message=True)
        assert bytes(server.engine.requests[0].prompt_token_ids) == b"user:hi;assistant:Well"
        both = {"continue_final_message": True, "add_generation_prompt": True}
        assert (await server.post(CHAT, messages=messages, **both)).status == 400

    in_server(test)


def test_without_a_wish_an_answer_may_fill_the_context() -> None:
    async def test(server: Server) -> None:
        await server.post(CHAT, messages=user("hi"))
        request = server.engine.requests[0]
        assert request.sampling.max_tokens == INFO.max_model_len - len(request.prompt_token_ids)

    in_server(test)


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b'"x"', b"\xff", b"[" * 9000])
def test_a_body_that_is_no_json_object_is_400(body: bytes) -> None:
    async def test(server: Server) -> None:
        answer = await call(server.api, "POST", CHAT, body)
        assert answer.status == 400 and answer.error["type"] == "invalid_request_error"

    in_server(test)


def test_models_are_listed_in_pages() -> None:
    async def page(server: Server, query: str) -> tuple[list[str], bool]:
        answer = await server.call("GET", f"/v1/models?{query}")
        assert answer.status == 200
        ids = [card["id"] for card in answer.json["data"]]
        assert (answer.json.get("first_id"), answer.json.get("last_id")) == (ids[0], ids[-1])
        return ids, answer.json["has_more"]

    async def test(server: Server) -> None:
        assert await page(server, "limit=1") == (["base"], True)
        assert await page(server, "limit=2") == (["base", "blue"], True)
        assert await page(server, "limit=3") == (["base", "blue", "red"], False)
        assert await page(server, "limit=1&after=base") == (["blue"], True)
        assert await page(server, "after=blue") == (["red"], False)
        assert (await server.call("GET", "/v1/models?after=red")).json["data"] == []
        for query in ("limit=0", "limit=1001", "limit=-1", "limit=x", "limit=", "after=a/b/c"):
            answer = await server.call("GET", f"/v1/models?{query}")
            assert answer.status == 400 and answer.error["param"] == query.partition("=")[0]

    in_server(test)


class Dawdler(Client):
    """Sends the beginning of a body, and then nothing."""

    async def _receive(self) -> dict[str, Any]:
        if self._parts:
            return {"type": "http.request", "body": self._parts.pop(), "more_body": True}
        await self._gone.wait()
        return {"type": "http.disconnect"}


def test_a_body_that_does_not_arrive_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "BODY_TIMEOUT_S", 0.05)

    async def test(server: Server) -> None:
        client = Dawdler(server.api, "POST", COMPLETIONS, b"{")
        await asyncio.wait_for(client.done, 10)
        assert client.answered.status == 408 and "arrive" in client.answered.error["message"]

    in_server(test)


def test_a_body_over_the_limit_is_413() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="x" * 10_001)
        assert answer.status == 413 and "10000" in answer.error["message"]

    in_server(test)


def test_a_path_may_end_in_a_slash() -> None:
    async def test(server: Server) -> None:
        plain, slash = [(await server.call("GET", f"/v1/models{end}")).json for end in ("", "/")]
        assert plain == slash
        assert (await server.post(f"{COMPLETIONS}/", prompt="x")).status == 200
        assert (await server.call("GET", "/v1/models/base/")).json["id"] == "base"
        assert (await server.call("GET", "/nowhere/")).status == 404

    in_server(test)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", CHAT, "OPTIONS, POST"), ("POST", "/v1/models", "GET, HEAD, OPTIONS")],
)
def test_a_wrong_method_is_told_the_right_ones(method: str, path: str, allow: str) -> None:
    async def test(server: Server) -> None:
        answer = await server.call(method, path)
        assert (answer.status, answer.headers["allow"]) == (405, allow)

    in_server(test)


PAGE = "https://app.example"


def asked_by(origin: str, **headers: str) -> list[tuple[bytes, bytes]]:
    named = {"origin": origin, **{name.replace("_", "-"): v for name, v in headers.items()}}
    return [(name.encode(), value.encode()) for name, value in named.items()]


def test_pages_of_configured_origins_may_ask() -> None:
    async def test(server: Server) -> None:
        wanted = {
            "access_control_request_method": "POST",
            "access_control_request_headers": "authorization,content-type",
        }
        preflight = Client(server.api, "OPTIONS", CHAT, b"", headers=asked_by(PAGE, **wanted))
        await preflight.done
        answered = preflight.answered
        assert answered.status == 200
        assert answered.headers["access-control-allow-origin"] == PAGE
        assert "POST" in answered.headers["access-control-allow-methods"]
        assert "authorization" in answered.headers["access-control-allow-headers"]
        stream = body(prompt="abc", stream=True)
        asked = Client(server.api, "POST", COMPLETIONS, stream, headers=asked_by(PAGE))
        await asked.done
        assert asked.answered.headers["access-control-allow-origin"] == PAGE
        assert asked.answered.text() == "ABC"
        other = Client(server.api, "GET", "/v1/models", b"", headers=asked_by("https://x.y"))
        await other.done
        assert "access-control-allow-origin" not in other.answered.headers

    settings = IngressSection(cors_origins=[PAGE])
    in_server(test, lambda: serving(ingress_settings=settings))


def test_without_origins_no_page_may_ask() -> None:
    async def test(server: Server) -> None:
        asked = Client(server.api, "GET", "/v1/models", b"", headers=asked_by(PAGE))
        await asked.done
        assert not any(name.startswith("access-control") for name in asked.answered.headers)

    in_server(test)


# ---- keep alive ----------------------------------------------------------------------------

OFTEN = IngressSection(keep_alive_s=0.02)
COMMENT = b": keep-alive\n\n"


def test_a_stream_that_waits_gets_comments() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = Client(server.api, "POST", CHAT, body(messages=user("x"), stream=True))
        await until(lambda: client.answered.body.count(COMMENT) >= 2)
        assert client.answered.status == 200
        server.engine.step()
        await until(lambda: b'"role":"assistant"' in client.answered.body)
        had = client.answered.body.count(COMMENT)
        await until(lambda: client.answered.body.count(COMMENT) > had)
        server.engine.running.set()
        await client.done
        client.answered.body = client.answered.body.replace(COMMENT, b"")
        assert client.answered.text() == "USER:X;"

    in_server(test, lambda: serving(ingress_settings=OFTEN))


def test_an_error_after_a_comment_is_an_event() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = Client(server.api, "POST", COMPLETIONS, body(prompt="abc", stream=True))
        await until(lambda: COMMENT in client.answered.body)
        server.engine.running.set()
        await client.done
        client.answered.body = client.answered.body.replace(COMMENT, b"")
        assert client.answered.status == 200
        assert client.answered.events[-1]["error"]["message"]

    engine = failing(ErrorKind.ENGINE_ERROR, 0)
    in_server(test, lambda: serving(engine, ingress_settings=OFTEN))


def test_a_stream_that_flows_gets_no_comment() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="abc", stream=True)
        assert COMMENT not in answer.body

    in_server(test)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", CHAT, 405), ("POST", "/health", 405)],
)
def test_wrong_routes_have_the_same_error_body(method: str, path: str, status: int) -> None:
    async def test(server: Server) -> None:
        answer = await server.call(method, path)
        assert answer.status == status
        assert set(answer.error) == {"message", "type", "param", "code"}

    in_server(test)


def failing(kind: str, after: int) -> FakeEngine:
    """An engine whose every request fails after so many tokens."""

    class Failing(FakeEngine):
        def step(self) -> None:
            for live in list(self._live.values()):
                if live.num_sent == after:
                    request_id = live.request.request_id
                    del self._live[request_id]
                    error = RequestError(kind, "no luck")
                    out = RequestOutput(request_id, 0, [], finish_reason="error", error=error)
                    self.on_frame([out])
            super().step()

    return Failing()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (ErrorKind.ADAPTER_INVALID, 400, "no luck"),
        (ErrorKind.ENGINE_ERROR, 500, "The server failed to process the request."),
    ],
)
def test_an_error_before_the_first_token_is_a_status(
    kind: str, status: int, message: str, stream: bool
) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="abc", stream=stream)
        assert answer.status == status and message in answer.error["message"]

    in_server(test, lambda: serving(failing(kind, 0)))


def test_an_error_in_the_middle_of_a_stream_is_its_last_event() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="abc", stream=True)
        assert answer.status == 200
        error = answer.events[-1]["error"]
        assert error["message"] == "The server failed to process the request."
        assert "[DONE]" not in answer.events

    in_server(test, lambda: serving(failing(ErrorKind.ENGINE_ERROR, 2)))


def test_a_fault_of_ours_is_500_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*arguments: object) -> Any:
        raise ZeroDivisionError

    async def test(server: Server) -> None:
        server.store.resolve = broken  # type: ignore[method-assign]
        answer = await server.post(COMPLETIONS, model="red", prompt="x")
        assert answer.status == 500 and answer.error["type"] == "server_error"
        assert "ZeroDivisionError" in caplog.text and "ZeroDivision" not in answer.body.decode()

    in_server(test)


def test_more_requests_than_the_limit_are_told_to_come_back() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        first = Client(server.api, "POST", COMPLETIONS, body(prompt="x"))
        await until(lambda: len(server.engine.requests) == 1)
        refused = await server.post(COMPLETIONS, prompt="y")
        assert refused.status == 429 and refused.headers["retry-after"] == "1"
        server.engine.running.set()
        await first.done
        assert (await server.post(COMPLETIONS, prompt="z")).status == 200

    in_server(test, lambda: serving(max_requests=1))


def test_the_queue_counts_answers_and_not_requests() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        first = Client(server.api, "POST", COMPLETIONS, body(prompt="x", n=3))
        await until(lambda: len(server.engine.requests) == 1)
        refused = await server.post(COMPLETIONS, prompt="y", n=2)
        assert refused.status == 429 and refused.headers["retry-after"] == "1"
        assert all(word in refused.error["message"] for word in ("3 ", "2 ", "4."))
        second = Client(server.api, "POST", COMPLETIONS, body(prompt="y"))
        await until(lambda: len(server.engine.requests) == 2)
        server.engine.running.set()
        await asyncio.gather(first.done, second.done)
        assert (await server.post(COMPLETIONS, prompt=["y", "z"], n=2)).status == 200

    in_server(test, lambda: serving(max_requests=4))


def test_more_answers_than_can_ever_be_queued_are_refused_for_good() -> None:
    async def test(server: Server) -> None:
        refused = await server.post(COMPLETIONS, prompt=["x"] * 26, n=4)
        assert (refused.status, refused.error["param"]) == (400, "n")
        assert "104 answers" in refused.error["message"] and "100" in refused.error["message"]
        assert server.engine.requests == []

    in_server(test)


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "base", **fields}).encode()


# ---- clients that go away ------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["the server says so", "the server cancels the call"])
def test_a_client_that_goes_away_frees_its_request(stream: bool, how: str) -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = Client(
            server.api, "POST", COMPLETIONS, body(model="red", prompt="abc", stream=stream)
        )
        await until(lambda: len(server.engine.requests) == 1)
        server.engine.step()
        if stream:
            await until(lambda: client.answered.body != b"")
        if how == "the server says so":
            client.hang_up()
            await client.done
        else:
            client.done.cancel()
            await asyncio.gather(client.done, return_exceptions=True)
        await until(lambda: server.engine.stats.num_running == 0)
        await until(lambda: server.store.pins == {"red-digest": 0})
        assert server.link.num_live == 0
        rendered = (await server.call("GET", "/metrics")).body.decode()
        assert f'reef_requests_total{{route="{COMPLETIONS}",status="499"}} 1.0' in rendered

    in_server(test, lambda: serving(saying("never the end")))


# ---- operation -----------------------------------------------------------------------------


def test_health_is_503_until_there_is_an_engine() -> None:
    async def test(server: Server) -> None:
        assert (await server.call("GET", "/health")).status == 200
        server.connection.kill("replica")
        await until(lambda: server.link.hello is None)
        for answer in (
            await server.call("GET", "/health"),
            await server.post(COMPLETIONS, prompt="x"),
        ):
            assert answer.status == 503 and "retry-after" in answer.headers

    in_server(test, lambda: serving(hello_s=0.0))


def test_prompts_of_refused_requests_are_not_counted() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        first = Client(server.api, "POST", COMPLETIONS, body(prompt="abc"))
        await until(lambda: len(server.engine.requests) == 1)
        for _ in range(3):
            assert (await server.post(COMPLETIONS, prompt="x" * 50)).status == 429
        server.engine.running.set()
        await first.done
        lines = (await server.call("GET", "/metrics")).body.decode().splitlines()
        assert 'reef_prompt_tokens_total{adapter="base"} 3.0' in lines

    in_server(test, lambda: serving(max_requests=1))


def test_metrics_say_what_was_served() -> None:
    async def test(server: Server) -> None:
        await server.post(COMPLETIONS, model="red", prompt="abc", stream=True)
        await server.post(COMPLETIONS, model="nobody", prompt="abc")
        answer = await server.call("GET", "/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = answer.body.decode().splitlines()
        label = 'adapter="public/red@1"'
        for line in (
            f"reef_prompt_tokens_total{{{label}}} 3.0",
            f"reef_generation_tokens_total{{{label}}} 8.0",
            f"reef_inter_token_latency_seconds_count{{{label}}} 7.0",
            f"reef_time_to_first_token_seconds_count{{{label}}} 1.0",
            f"reef_time_per_output_token_seconds_count{{{label}}} 1.0",
            f"reef_request_seconds_count{{{label}}} 1.0",
            f"reef_request_queue_seconds_count{{{label}}} 1.0",
            'reef_requests_running{model="base"} 0.0',
            f'reef_requests_total{{route="{COMPLETIONS}",status="404"}} 1.0',
        ):
            assert line in lines, line

    in_server(test)
