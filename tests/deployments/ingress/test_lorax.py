"""LoRAX's routes end to end in one process, with an engine that answers in capitals."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapter_store.recipes import make_recipe
from deployments.policy.admission import NO_LIMITS
from deployments.tenants.tenants import Keyring
from deployments.text.embedding_use import EmbeddingUse
from engine.messages import ErrorKind, GenerateRequest, RequestError, RequestOutput
from tests.deployments.support.fakes import (
    BASE,
    EOS,
    Answered,
    FakeEngine,
    Server,
    call,
    encode,
    in_server,
)
from tests.deployments.support.keys import ACME, keys_file

SEED_DRAWN = 1000
BOTH = {"ids": ["red", "blue"], "weights": [0.7, 0.3]}


def saying(*texts: str) -> FakeEngine:
    """Each choice says another of these."""

    def answer(request: GenerateRequest) -> list[int]:
        at = (request.sampling.seed - SEED_DRAWN) % len(texts)
        return [*encode(texts[at]), EOS]

    return FakeEngine(answer)


async def ask(server: Server, path: str = "/", inputs: str = "hi", **parameters: Any) -> Answered:
    return await server.call("POST", path, {"inputs": inputs, "parameters": parameters})


def events(answer: Answered) -> list[Any]:
    lines = answer.body.decode().split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data:") for line in lines)
    return [json.loads(line.removeprefix("data:")) for line in lines]


def test_the_root_answers_with_a_list_of_one_and_generate_without_a_list() -> None:
    async def test(server: Server) -> None:
        answer = await ask(server)
        assert answer.status == 200
        assert answer.json == [{"generated_text": "HI"}]
        assert (await ask(server, "/generate")).json == {"generated_text": "HI"}
        assert (await ask(server, "/invocations")).json == answer.json
        assert (await server.call("POST", "/", {"inputs": "hi"})).json == answer.json
        assert (await server.call("POST", "/", {"inputs": "hi", "parameters": None})).status == 200

    in_server(test)


def test_details_name_every_token_the_end_and_the_seed() -> None:
    async def test(server: Server) -> None:
        [answer] = (await ask(server, details=True, do_sample=True, return_k_alternatives=2)).json
        details = answer["details"]
        assert details["seed"] == SEED_DRAWN and details["prefill"] == []
        assert details["finish_reason"] == "eos_token"
        counts = [details[f"{kind}_tokens"] for kind in ("prompt", "generated", "skipped")]
        assert counts == [2, 3, 0] and "best_of_sequences" not in details
        tokens = details["tokens"]
        assert [t["text"] for t in tokens] == ["H", "I", "<eos>"]
        assert [t["special"] for t in tokens] == [False, False, True]
        assert [t["id"] for t in tokens] == [*encode("HI"), EOS]
        top = [(a["id"], a["text"], a["logprob"]) for a in tokens[0]["alternative_tokens"]]
        assert top == [(ord("H"), "H", -0.5), (ord("I"), "I", -1.5)]

    in_server(test)


def test_decoder_input_details_bring_the_prompts_tokens_and_not_its_text() -> None:
    async def test(server: Server) -> None:
        [answer] = (await ask(server, decoder_input_details=True)).json
        assert answer["generated_text"] == "HI"
        prefill = answer["details"]["prefill"]
        assert [(t["id"], t["text"], t["logprob"]) for t in prefill] == [
            (ord("h"), "h", None),
            (ord("i"), "i", -2.0),
        ]
        assert len(answer["details"]["tokens"]) == 3
        assert server.engine.requests[0].sampling.prompt_logprobs == 0

    in_server(test)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, (0.0, 0, 1.0)),
        ({"do_sample": True}, (1.0, 0, 1.0)),
        ({"temperature": 1.0}, (0.0, 0, 1.0)),
        ({"temperature": 0.5}, (0.5, 0, 1.0)),
        ({"temperature": 0, "do_sample": True}, (0.0, 0, 1.0)),
        ({"top_k": 5}, (1.0, 5, 1.0)),
        ({"top_p": 0.5, "typical_p": 1.0, "watermark": False}, (1.0, 0, 0.5)),
    ],
)
def test_an_answer_is_greedy_unless_something_asks_for_sampling(
    parameters: dict[str, Any], expected: tuple[float, int, float]
) -> None:
    async def test(server: Server) -> None:
        assert (await ask(server, **parameters)).status == 200
        sampling = server.engine.requests[0].sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == expected

    in_server(test)


def test_the_length_is_all_of_the_context_unless_it_is_given() -> None:
    async def test(server: Server) -> None:
        await ask(server)
        await ask(server, max_new_tokens=1, details=True, ignore_eos_token=True)
        assert [r.sampling.max_tokens for r in server.engine.requests] == [126, 1]
        [answer] = (await ask(server, max_new_tokens=1, details=True)).json
        assert answer["details"]["finish_reason"] == "length"

    in_server(test)


def test_a_stop_sequence_ends_the_answer_and_is_part_of_it() -> None:
    async def test(server: Server) -> None:
        [answer] = (await ask(server, inputs="abcdef", stop=["CD"], details=True)).json
        assert answer["generated_text"] == "ABCD"
        assert answer["details"]["finish_reason"] == "stop_sequence"
        assert answer["details"]["generated_tokens"] == 4

    in_server(test)


def test_the_full_text_begins_with_the_prompt_in_streams_too() -> None:
    async def test(server: Server) -> None:
        full = {"return_full_text": True}
        assert (await ask(server, "/generate", **full)).json["generated_text"] == "hiHI"
        last = events(await ask(server, "/generate_stream", **full))[-1]
        assert last["generated_text"] == "hiHI" and last["details"] is None

    in_server(test)


def test_best_of_returns_the_likeliest_and_lists_the_others() -> None:
    async def test(server: Server) -> None:
        [answer] = (await ask(server, best_of=3, do_sample=True, details=True)).json
        others = answer["details"]["best_of_sequences"]
        texts = [answer["generated_text"], *(o["generated_text"] for o in others)]
        assert sorted(texts) == ["A", "BB", "CCC"]
        seeds = {answer["details"]["seed"], *(o["seed"] for o in others)}
        assert seeds == {SEED_DRAWN, SEED_DRAWN + 1, SEED_DRAWN + 2}
        assert all(o["finish_reason"] == "eos_token" and o["tokens"] for o in others)

    in_server(test, engine=saying("A", "BB", "CCC"))


def test_a_stream_has_an_event_for_each_token_and_all_of_it_in_the_last() -> None:
    async def test(server: Server) -> None:
        for path, stream in (("/generate_stream", None), ("/generate_stream", True), ("/", True)):
            body = {"inputs": "h\u00e9", "stream": stream, "parameters": {"details": True}}
            answer = await server.call("POST", path, body)
            assert answer.headers["content-type"].startswith("text/event-stream")
            *first, last = events(answer)
            assert [e["token"]["id"] for e in (*first, last)] == [*"H\u00e9".encode(), EOS]
            texts = [e["token"]["text"] for e in (*first, last)]
            assert texts == ["H", "", "\u00e9", "<eos>"]
            assert all(e["generated_text"] is None and e["details"] is None for e in first)
            assert last["generated_text"] == "H\u00e9"
            assert last["details"] == {
                "finish_reason": "eos_token",
                "prompt_tokens": 3,
                "generated_tokens": 4,
                "seed": None,
            }

    in_server(test, engine=saying("H\u00e9"))


def test_a_stream_that_a_stop_sequence_ends_holds_nothing_back() -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, "/generate_stream", inputs="xaab", stop=["AB"], details=True)
        *first, last = events(answer)
        assert [e["token"]["text"] for e in first] == ["X", "A", "A"]
        assert last["token"]["text"] == "B" and last["generated_text"] == "XAAB"
        assert last["details"]["finish_reason"] == "stop_sequence"

    in_server(test)


def test_headers_tell_counts_times_and_names() -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, adapter_id="red", details=True)
        headers = answer.headers
        assert headers["x-model-id"] == "base" and headers["x-adapter-id"] == "red"
        assert headers["x-adapter-source"] == "local" and headers["x-compute-characters"] == "2"
        names = ("prompt", "generated", "skipped", "total")
        [document] = answer.json
        assert len(document["details"]["tokens"]) == 7
        assert [headers[f"x-{name}-tokens"] for name in names] == ["2", "7", "0", "9"]
        times = ("total", "compute", "validation", "queue", "inference")
        assert all(int(headers[f"x-{name}-time"]) >= 0 for name in times)
        per_token = ("time-per-token", "time-to-first-token", "time-per-output-token")
        assert all(int(headers[f"x-{name}"]) >= 0 for name in per_token)
        stream = await ask(server, "/generate_stream", adapter_id="red", adapter_source="s3")
        assert stream.headers["x-adapter-source"] == "s3" and "x-total-time" not in stream.headers
        assert "x-adapter-id" not in (await ask(server, adapter_id="base")).headers

    in_server(test)


@pytest.mark.parametrize("adapter_id", [None, "", "base"])
def test_without_an_adapter_the_base_answers(adapter_id: str | None) -> None:
    async def test(server: Server) -> None:
        answer = await ask(
            server, adapter_id=adapter_id, adapter_source="hub" if not adapter_id else None
        )
        assert answer.json == [{"generated_text": "HI"}]

    in_server(test)


@pytest.mark.parametrize("adapter_id", ["red", "red@1", "base:red"])
def test_an_adapter_answers_under_all_its_names(adapter_id: str) -> None:
    async def test(server: Server) -> None:
        assert (await ask(server, adapter_id=adapter_id)).json == [{"generated_text": "red:HI"}]

    in_server(test)


@pytest.mark.parametrize(
    ("more", "recipe"),
    [
        ({}, ("linear",)),
        ({"density": 0.5, "majority_sign_method": "frequency"}, ("linear",)),
        ({"merge_strategy": "ties", "density": 0.5}, ("ties", 0.5, "total")),
        ({"merge_strategy": "dare_linear", "density": 0.2}, ("dare_linear", 0.2)),
        (
            {"merge_strategy": "dare_ties", "density": 1, "majority_sign_method": "frequency"},
            ("dare_ties", 1.0, "frequency"),
        ),
    ],
)
def test_merged_adapters_are_one_adapter_of_their_own(
    more: dict[str, Any], recipe: tuple[Any, ...]
) -> None:
    async def test(server: Server) -> None:
        expected = make_recipe(["red-digest", "blue-digest"], [0.7, 0.3], *recipe).digest(BASE)
        for path in ("/", "/base"):
            answer = await ask(server, path, merged_adapters={**BOTH, **more})
            assert answer.status == 200, answer.body
            assert answer.headers["x-adapter-id"] == "red,blue"
            folder = server.engine.requests[-1].adapter_folder
            assert folder is not None and folder.digest == expected
        unknown = {"ids": ["red", "nobody"], "weights": [1, 1]}
        answer = await ask(server, merged_adapters=unknown)
        assert answer.status == 404 and "'nobody'" in answer.json["error"]

    in_server(test)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"adapter_id": "red", "adapter_source": "hub"}, "adapter_source"),
        ({"adapter_source": "elsewhere"}, "adapter_source"),
        ({"merged_adapters": {"ids": ["red"], "weights": [1]}, "adapter_id": "blue"}, "adapter_id"),
        ({"merged_adapters": {"ids": [], "weights": []}}, "merged_adapters.ids"),
        ({"merged_adapters": {"ids": ["red"], "weights": []}}, "merged_adapters"),
        ({"merged_adapters": {"ids": ["red"] * 9, "weights": [1] * 9}}, "merged_adapters.ids"),
        ({"merged_adapters": {"ids": ["red"], "weights": [101]}}, "101"),
        ({"merged_adapters": {**BOTH, "merge_strategy": "mean"}}, "merge_strategy"),
        ({"merged_adapters": {**BOTH, "merge_strategy": "ties"}}, "density"),
        ({"merged_adapters": {**BOTH, "merge_strategy": "ties", "density": 2}}, "density"),
        ({"merged_adapters": {**BOTH, "majority_sign_method": "x"}}, "majority_sign_method"),
        ({"merged_adapters": BOTH, "adapter_source": "hub"}, "adapter_source"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"apply_chat_template": True}, "apply_chat_template"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 129, "do_sample": True}, "best_of"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1000}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"return_k_alternatives": 0}, "return_k_alternatives"),
        ({"return_k_alternatives": 21}, "return_k_alternatives"),
        ({"response_format": {"type": "regex"}}, "response_format"),
        (
            {"ignore_eos_token": True, "response_format": {"type": "json_object"}},
            "ignore_eos_token",
        ),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_is_wrong_is_a_422_that_names_the_field(
    parameters: dict[str, Any], named: str
) -> None:
    async def test(server: Server) -> None:
        for path in ("/", "/generate", "/generate_stream"):
            answer = await ask(server, path, **parameters)
            assert answer.status == 422
            assert set(answer.json) == {"error", "error_type"}
            assert answer.json["error_type"] == "validation"
            assert named in answer.json["error"]

    in_server(test)


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/", {"inputs": ""}, 422, "validation"),
        ("/", {}, 422, "validation"),
        ("/", [], 422, "validation"),
        ("/", {"inputs": "x" * 200}, 422, "validation"),
        ("/", {"inputs": "x" * 20_000}, 413, "validation"),
        ("/", {"inputs": "x", "parameters": {"adapter_id": "nobody"}}, 404, "not_found"),
        ("/", {"inputs": "x", "parameters": {"adapter_id": "no/such/name"}}, 404, "not_found"),
        ("/generate", {"inputs": "x", "stream": True}, 422, "validation"),
        ("/generate_stream", {"inputs": "x", "stream": False}, 422, "validation"),
    ],
)
def test_errors_have_loraxs_form(path: str, body: object, status: int, kind: str) -> None:
    async def test(server: Server) -> None:
        answer = await server.call("POST", path, body)
        assert answer.status == status
        assert answer.json["error_type"] == kind and answer.json["error"]

    in_server(test)


@pytest.mark.parametrize(
    "parameters", [{"best_of": 2, "do_sample": True}, {"decoder_input_details": True}]
)
def test_a_stream_refuses_what_only_a_document_can_hold(parameters: dict[str, Any]) -> None:
    async def test(server: Server) -> None:
        assert (await ask(server, "/generate_stream", **parameters)).status == 422

    in_server(test)


@pytest.mark.parametrize(
    ("kind", "status", "error_type"),
    [
        (ErrorKind.ENGINE_ERROR, 424, "generation"),
        (ErrorKind.OVERLOADED, 429, "overloaded"),
        (ErrorKind.ADAPTER_UNAVAILABLE, 503, "unavailable"),
    ],
)
def test_what_fails_in_the_engine_is_an_error_before_and_inside_a_stream(
    kind: ErrorKind, status: int, error_type: str
) -> None:
    async def test(server: Server) -> None:
        def fail(outputs: list[RequestOutput]) -> None:
            error = RequestError(kind, "no")
            relay(
                [
                    RequestOutput(o.request_id, o.index, [], finish_reason="error", error=error)
                    for o in outputs
                ]
            )

        relay = server.engine.on_frame
        server.engine.on_frame = fail
        answer = await ask(server, "/generate_stream")
        assert (answer.status, answer.json["error_type"]) == (status, error_type)
        seen: list[int] = []

        def fail_later(outputs: list[RequestOutput]) -> None:
            seen.append(1)
            (fail if len(seen) > 1 else relay)(outputs)

        server.engine.on_frame = fail_later
        answer = await ask(server, "/generate_stream")
        assert answer.status == 200
        assert events(answer)[-1]["error_type"] == error_type

    in_server(test)


def test_truncate_keeps_the_last_tokens_of_the_prompt() -> None:
    async def test(server: Server) -> None:
        long = "x" * 500 + "abc"
        answer = await ask(server, inputs=long, truncate=2, decoder_input_details=True)
        [document] = answer.json
        assert document["generated_text"] == "BC"
        assert [t["text"] for t in document["details"]["prefill"]] == ["b", "c"]
        assert answer.headers["x-prompt-tokens"] == "2"
        assert (await ask(server, truncate=0)).status == 422
        assert (await ask(server, inputs=long, truncate=400)).status == 422

    in_server(test)


def test_a_seed_of_64_bits_is_used_and_repeated() -> None:
    async def test(server: Server) -> None:
        for seed, engines in ((7, 7), (2**64 - 1, -1), (2**63, -(2**63))):
            [answer] = (await ask(server, seed=seed, do_sample=True, details=True)).json
            assert answer["details"]["seed"] == seed
            assert server.engine.requests[-1].sampling.seed == engines

    in_server(test)


def test_embed_gives_the_vector_of_an_embedding() -> None:
    async def test(server: Server) -> None:
        for adapter_id, model in ((None, "base"), ("red", "red")):
            expected = await server.post("/v1/embeddings", model=model, input="hi")
            body = {"inputs": "hi", "parameters": {"adapter_id": adapter_id}, "stream": False}
            for path in ("/embed", "/base/embed"):
                answer = await server.call("POST", path, body)
                assert answer.json == {"embeddings": expected.json["data"][0]["embedding"]}
        for parameters, status in (
            ({"adapter_id": "nobody"}, 404),
            ({"adapter_id": "red", "adapter_source": "pbase"}, 422),
            ({"merged_adapters": BOTH}, 422),
        ):
            body = {"inputs": "hi", "parameters": parameters}
            answer = await server.call("POST", "/embed", body)
            assert answer.status == status and "error_type" in answer.json
        assert (await server.call("POST", "/embed", {"inputs": ""})).status == 422

    in_server(test, embeddings=EmbeddingUse("mean"))


def test_tokenize_lists_ids_and_their_characters() -> None:
    async def test(server: Server) -> None:
        answer = await server.call("POST", "/tokenize", {"inputs": "a b"})
        assert answer.json == [
            {"id": 97, "text": "a", "start": 0, "stop": 1},
            {"id": 32, "text": "\u0120", "start": 1, "stop": 2},
            {"id": 98, "text": "b", "start": 2, "stop": 3},
        ]
        assert (await server.call("POST", "/tokenize", {"inputs": "x" * 9000})).status == 400

    in_server(test)


def test_info_describes_the_first_model() -> None:
    async def test(server: Server) -> None:
        info = (await server.call("GET", "/info")).json
        assert (info["model_id"], info["model_sha"]) == ("base", BASE)
        assert (info["max_total_tokens"], info["max_input_length"]) == (128, 127)

    in_server(test)


def test_below_a_bases_path_its_adapters_answer() -> None:
    async def test(server: Server) -> None:
        for path in ("/base", "/base/generate"):
            assert (await ask(server, path)).status == 200
            answer = await ask(server, path, adapter_id="red")
            assert b"red:HI" in answer.body and answer.headers["x-model-id"] == "base"
        assert (await server.call("GET", "/base/info")).json["model_id"] == "base"
        assert (await ask(server, "/base/generate", adapter_id="nobody")).status == 404

    in_server(test)


def test_health_is_also_asked_for_at_loraxs_paths() -> None:
    async def test(server: Server) -> None:
        for path in ("/", "/ping", "/startup"):
            answer = await server.call("GET", path)
            assert answer.status == 200 and answer.json["status"] == "ok"

    in_server(test)


def test_a_key_may_come_as_api_token_where_no_header_does(tmp_path: Path) -> None:
    key = ACME

    async def test(server: Server) -> None:
        assert (await ask(server)).status == 401
        assert (await ask(server, api_token="wrong")).json["error_type"] == "authentication"
        assert (await ask(server, api_token=key)).status == 200
        assert server.engine.requests[-1].tenant == "acme"
        body = json.dumps({"inputs": "x", "parameters": {"api_token": "a hub's"}}).encode()
        assert (await call(server.api, "POST", "/", body, key)).status == 200
        body = json.dumps({"inputs": "x", "parameters": {"api_token": key}}).encode()
        assert (await call(server.api, "POST", "/", body, "wrong")).status == 401
        body = json.dumps({"inputs": "x", "parameters": {"api_token": key}}).encode()
        assert (await call(server.api, "POST", "/embed", body)).status != 401
        for raw in (b"[]", b'{"parameters": 1}', b'{"parameters": {"api_token": 1}}'):
            assert (await call(server.api, "POST", "/", raw)).status == 401

    in_server(test, tenants=Keyring(keys_file(tmp_path), NO_LIMITS))
