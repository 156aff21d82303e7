"""`/v1/embeddings`, from the text to the vector: with the fake engine, and with a real one."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from deployments.config_sections import IngressSection
from deployments.ingress import embedding
from deployments.policy.admission import Limits
from deployments.tenants.tenants import Everybody
from deployments.text.embedding_use import EmbeddingUse
from tests.deployments.support.fakes import Client, Server, in_server, until
from tests.deployments.support.real_engine import FolderStore, RealEngine
from tests.engine.support.driver import write_adapter
from tests.engine.support.tiny import load_reference, write_tiny

PATH = "/v1/embeddings"
RAW = EmbeddingUse("mean", normalize=False)
NORMAL = EmbeddingUse("last")


async def vectors_of(server: Server, **body: Any) -> list[list[float]]:
    answer = await server.post(PATH, **body)
    assert answer.status == 200, answer.body
    assert [item["index"] for item in answer.json["data"]] == list(range(len(answer.json["data"])))
    return [item["embedding"] for item in answer.json["data"]]


# ---- the real engine ----


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_vectors_are_those_of_transformers_and_peft(pooling: str, tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "base", "qwen3", vocab_size=258, eos_token_id=256)
    adapter = write_adapter(tiny.folder, tmp_path / "red")
    texts = ["a", "The quick brown fox", "jumps over the lazy dog. " * 5]
    tuned = PeftModel.from_pretrained(load_reference(tiny.folder, torch.float32), adapter.path)
    models = {"base": tiny.reference, "red": tuned.merge_and_unload()}

    @torch.inference_mode()
    def expected(name: str, text: str) -> list[float]:
        ids = torch.tensor([list(text.encode())])
        hidden = models[name].base_model(ids).last_hidden_state[0]
        row = {"mean": hidden.mean(0), "last": hidden[-1], "cls": hidden[0]}[pooling]
        return torch.nn.functional.normalize(row, dim=0).tolist()

    async def test(server: Server) -> None:
        chat = {"prompt": "hello", "max_tokens": 60, "ignore_eos": True, "temperature": 0}
        beside = asyncio.ensure_future(server.post("/v1/completions", **chat))
        found = await asyncio.gather(*(vectors_of(server, model=m, input=texts) for m in models))
        for name, vectors in zip(models, found, strict=True):
            for text, vector in zip(texts, vectors, strict=True):
                assert vector == pytest.approx(expected(name, text), abs=1e-4)
        assert (await beside).json["usage"]["completion_tokens"] == 60

    engine = RealEngine(tiny.folder, max_num_batched_tokens=32)
    store = FolderStore(red=Path(adapter.path))
    in_server(test, engine=engine, store=store, embeddings=EmbeddingUse(pooling))
    assert engine.engine.stats.num_blocks_used == 0


# ---- fields ----


@pytest.mark.parametrize(
    ("given", "lengths"),
    [
        ("abc", [3]),
        (["abc", "z"], [3, 1]),
        ([5, 6, 7, 8], [4]),
        ([[5], [6, 7]], [1, 2]),
    ],
    ids=str,
)
def test_texts_and_token_ids_are_taken(given: Any, lengths: list[int]) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(PATH, input=given, user="u", metadata={"a": 1})
        assert [item["embedding"][0] for item in answer.json["data"]] == lengths
        assert {item["object"] for item in answer.json["data"]} == {"embedding"}
        usage = {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
        assert answer.json["usage"] == usage
        assert (answer.json["object"], answer.json["model"]) == ("list", "base")
        assert {r.sampling.pooling for r in server.engine.requests} == {"mean"}

    in_server(test, embeddings=RAW)


def test_base64_is_of_little_endian_floats() -> None:
    async def test(server: Server) -> None:
        [text] = await vectors_of(server, input="abc", encoding_format="base64")
        assert np.frombuffer(base64.b64decode(str(text)), "<f4").tolist() == [3, 97, 99, 0]

    in_server(test, embeddings=RAW)


def test_dimensions_are_cut_before_the_length_is_made_1() -> None:
    async def test(server: Server) -> None:
        [vector] = await vectors_of(server, input="abc", dimensions=2)
        expected = np.array([3, 97]) / np.hypot(3, 97)
        assert vector == pytest.approx(expected.tolist(), abs=1e-7)
        assert await vectors_of(server, input="abc", normalize=False) == [[3, 97, 99, 0]]

    in_server(test, embeddings=NORMAL)


@pytest.mark.parametrize(("keep", "first"), [(4, "e"), (1, "h"), (-1, "a"), (128, "a")])
def test_the_last_tokens_of_a_longer_text_are_kept(keep: int, first: str) -> None:
    async def test(server: Server) -> None:
        ids = list(b"abcdefgh")
        for given in ("abcdefgh", ids):
            [vector] = await vectors_of(server, input=given, truncate_prompt_tokens=keep)
            assert vector[1] == ord(first) and vector[2] == ord("h")
        [vector] = await vectors_of(server, input="x" * 500, truncate_prompt_tokens=-1)
        assert vector[0] == 128

    in_server(test, embeddings=RAW)


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"input": ""}, "input", "empty"),
        ({"input": ["a", ""]}, "input[1]", "empty"),
        ({"input": [[1], []]}, "input[1]", "empty"),
        ({"input": []}, "input", "non-empty"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": [999]}, "input", "token id 999 is outside 0..257"),
        ({"input": "x" * 129}, "input", "129 tokens, and the model's context holds 128"),
        ({"input": "x" * 100_000}, "input", "100000 bytes"),
        ({"input": [5] * 129}, "input", "129 tokens"),
        ({"input": "a", "dimensions": 5}, "dimensions", "must be in [1, 4], not 5"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "[1, 128]"),
        ({"input": "a", "truncate_prompt_tokens": 129}, "truncate_prompt_tokens", "[1, 128]"),
        ({"input": "a", "pooling": "max"}, "pooling", "Unknown field"),
        ({}, "input", "required"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_bad_field_is_refused_by_name(fields: dict[str, Any], param: str, part: str) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(PATH, **fields)
        assert (answer.status, answer.error["param"]) == (400, param)
        assert part in answer.error["message"], answer.error
        assert server.engine.requests == []

    in_server(test, embeddings=RAW, ingress_settings=IngressSection(max_body_bytes=200_000))


def test_an_answer_has_a_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "MAX_VALUES", 8)

    async def test(server: Server) -> None:
        answer = await server.post(PATH, input=["a", "b", "c"])
        assert answer.status == 400 and "at most 8, so ask for at most 2" in answer.error["message"]
        assert len(await vectors_of(server, input=["a", "b", "c"], dimensions=2)) == 3

    in_server(test, embeddings=RAW)


def test_a_model_without_that_use_says_what_to_set() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(PATH, input="a")
        assert (answer.status, answer.error["param"]) == (400, "model")
        assert "set models[].embeddings.pooling" in answer.error["message"]
        answer = await server.post(PATH, input="a", model="nobody")
        assert answer.status == 404

    in_server(test)


# ---- many texts, limits, losses ----


def test_many_texts_are_in_the_engine_a_few_at_a_time() -> None:
    most = 0

    async def test(server: Server) -> None:
        nonlocal most
        inside = server.engine.submit

        def noted(request: Any) -> None:
            nonlocal most
            inside(request)
            most = max(most, server.link.num_live)

        server.engine.submit = noted  # type: ignore[method-assign]
        texts = [chr(97 + i % 26) * (1 + i % 7) for i in range(300)]
        found = await vectors_of(server, input=texts)
        assert [v[:2] for v in found] == [[len(t), ord(t[0])] for t in texts]
        metrics = (await server.call("GET", "/metrics")).body.decode()
        num = sum(map(len, texts))
        assert f'reef_prompt_tokens_total{{adapter="base"}} {num}.0' in metrics
        assert f'reef_requests_total{{route="{PATH}",status="200"}} 1.0' in metrics

    in_server(test, embeddings=RAW, max_requests=100)
    assert most == embedding.AT_ONCE


def test_a_tenants_limit_makes_it_fewer_at_a_time() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = Client(server.api, "POST", PATH, BODY)
        await until(lambda: len(server.engine.requests) == 3)
        refused = await server.post(PATH, input="a")
        assert refused.status == 429
        server.engine.running.set()
        await client.done
        assert len(client.answered.json["data"]) == 10

    in_server(test, embeddings=RAW, tenants=Everybody(Limits(max_concurrent_requests=3)))


BODY = json.dumps({"model": "base", "input": ["text"] * 10}).encode()


def test_a_client_that_leaves_leaves_nothing_behind() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = Client(server.api, "POST", PATH, BODY)
        await until(lambda: len(server.engine.requests) == 10)
        client.hang_up()
        await client.done
        await until(lambda: len(server.engine.aborted) == 10)
        assert server.link.num_live == 0 and client.answered.status == 0

    in_server(test, embeddings=RAW)


def test_vectors_survive_an_engine_that_dies() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = Client(server.api, "POST", PATH, BODY)
        await until(lambda: len(server.engine.requests) == 10)
        server.engine.die()
        server.engine.is_up = True
        server.engine.running.set()
        await client.done
        assert [item["embedding"][0] for item in client.answered.json["data"]] == [4] * 10

    in_server(test, embeddings=RAW, patience_s=5.0)


def test_texts_that_could_not_be_embedded_cost_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(server: Server) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(embedding.EmbeddingResponse, "_vector_of", lambda *_: 1 / 0)
            assert (await server.post(PATH, input="abcdef")).status == 500
        assert (await server.post(PATH, input="abcdef")).status == 200
        assert (await server.post(PATH, input="abcdef")).status == 429

    in_server(test, embeddings=RAW, tenants=Everybody(Limits(tokens_per_day=10)))
