"""What a request is charged for, however it ends: a table of what is right.

Output is what the client was sent; a prompt counts once, when its answer has begun; an answer that
is an error costs nothing.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.policy.admission import Limits
from deployments.tenants.key_id import key_id
from deployments.tenants.tenants import Keyring
from deployments.text.embedding_use import EmbeddingUse
from deployments.usage.meter import UsageMeter
from deployments.usage.reader import Found, read_records
from deployments.usage.record import UsageRecord
from tests.deployments.support.dictated import SETTINGS, THINKING, dictated
from tests.deployments.support.fakes import Client, Server, byte_vocabulary, in_server, until
from tests.deployments.support.keys import ACME, digest, keys_file
from tests.deployments.support.real_engine import FolderStore, RealEngine
from tests.deployments.support.tiny_models import make_adapter, make_base

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "abcdef"  # six tokens; the engine answers in capitals and an end token, which counts


def records_of(
    folder: Path, test: Callable[[Server], Awaitable[object]], **how: Any
) -> list[UsageRecord]:
    """Run a test beside a meter. Returns all records, by the order of their beginnings."""
    meter = UsageMeter(folder, 2**20, None, 0.01, 60.0, num_slots=64)

    async def run(server: Server) -> None:
        await test(server)

    in_server(run, meter=meter, **how)
    meter.close()
    found = Found()
    records = list(read_records(None, [folder], found))
    assert (found.repeated, found.damaged_lines, found.lost_requests) == (0, 0, 0)
    return sorted(records, key=lambda record: int(record.id.rpartition("-")[2]))


def counts(record: UsageRecord) -> tuple[int, int, int, int, str]:
    tokens = record.prompt_tokens, record.cached_tokens, record.output_tokens
    return (*tokens, record.status, record.finish_reason)


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, **fields}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        pytest.param({}, (6, 2, 7, 200, "stop"), id="a stop token counts"),
        pytest.param({"max_tokens": 3}, (6, 2, 3, 200, "length"), id="length"),
        pytest.param({"n": 3}, (6, 2, 21, 200, "stop"), id="n shares its prompt"),
        pytest.param({"prompt": ["abc", "de"], "n": 2}, (5, 4, 14, 200, "stop"), id="two prompts"),
        pytest.param({"stop": "CD"}, (6, 2, 4, 200, "stop"), id="a stop string"),
        pytest.param({"logprobs": 1}, (6, 2, 7, 200, "stop"), id="log probabilities"),
    ],
)
def test_an_answer_is_charged_as_its_usage_says(
    tmp_path: Path, fields: dict[str, Any], wanted: tuple[object, ...], stream: bool
) -> None:
    usage: dict[str, Any] = {}

    async def test(server: Server) -> None:
        more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer = await server.post(COMPLETIONS, **body(**fields, **more))
        usage.update(answer.chunks[-1]["usage"] if stream else answer.json["usage"])

    [record] = records_of(tmp_path, test)
    assert counts(record) == wanted
    assert record.prompt_tokens == usage["prompt_tokens"]
    assert record.output_tokens == usage["completion_tokens"]
    assert record.cached_tokens == usage["prompt_tokens_details"]["cached_tokens"]
    assert record.queue_s == 0.01 and 0 < (record.ttft_s or 0) <= record.e2e_s


def test_a_prompt_alone_costs_no_output(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, **body(max_tokens=0, echo=True))
        assert answer.json["usage"]["completion_tokens"] == 0

    assert [counts(r) for r in records_of(tmp_path, test)] == [(6, 2, 0, 200, "length")]


def test_the_best_of_several_are_all_charged_as_the_usage_says(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, **body(n=1, best_of=2))
        assert answer.json["usage"]["completion_tokens"] == 14

    assert [counts(r) for r in records_of(tmp_path, test)] == [(6, 2, 14, 200, "stop")]


def test_drafted_tokens_cost_nothing_beside_the_output(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        server.engine.drafted = (9, 4)
        await server.post(COMPLETIONS, **body())

    assert counts(records_of(tmp_path, test)[0]) == (6, 2, 7, 200, "stop")


def test_a_cold_adapter_costs_its_load_once_for_the_request_that_had_it_loaded(
    tmp_path: Path,
) -> None:
    bases, adapter = tmp_path / "base", tmp_path / "adapter"
    make_base(bases, 64)
    make_adapter(adapter, bases, 8, 1)
    engine = RealEngine(bases)

    async def test(server: Server) -> None:
        for model in ("base", "red", "red"):
            answer = await server.post(
                COMPLETIONS, model=model, prompt=[1, 2, 3], max_tokens=2, n=2, ignore_eos=True
            )
            assert answer.status == 200, answer.body

    store = FolderStore(red=adapter)
    records = records_of(tmp_path / "usage", test, engine=engine, store=store)
    assert [record.load_bytes for record in records][::2] == [0, 0]
    assert records[1].load_bytes > 0 and records[1].output_tokens == 4


# ---- clients that leave --------------------------------------------------------------------


def start(server: Server, **fields: Any) -> Client:
    return Client(
        server.api, "POST", COMPLETIONS, json.dumps(body(model="base", **fields)).encode()
    )


def num_events(client: Client) -> int:
    return client.answered.body.count(b'"text"')


@pytest.mark.parametrize(
    ("steps", "stream", "wanted"),
    [
        (0, True, (0, 0, 0, 499, "abort")),
        (3, True, (6, 2, 3, 499, "abort")),
        (0, False, (0, 0, 0, 499, "abort")),
        (3, False, (6, 2, 0, 499, "abort")),
    ],
    ids=["before a token", "in a stream", "before a token, whole", "before the document"],
)
def test_a_client_that_leaves_pays_for_what_it_was_sent(
    tmp_path: Path, steps: int, stream: bool, wanted: tuple[object, ...]
) -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = start(server, stream=stream)
        await until(lambda: len(server.engine.requests) == 1)
        for sent in range(steps):
            server.engine.step()
            await until(lambda: not stream or num_events(client) == sent + 1)  # noqa: B023
        await asyncio.sleep(0.01)  # a whole answer's tokens are read meanwhile
        client.hang_up()
        await asyncio.gather(client.done, return_exceptions=True)

    assert [counts(r) for r in records_of(tmp_path, test)] == [wanted]


# ---- failures ------------------------------------------------------------------------------


def test_an_answer_that_is_an_error_costs_nothing(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = start(server, stream=False)
        await until(lambda: len(server.engine.requests) == 1)
        server.engine.step()
        server.engine.die()
        await client.done
        assert client.answered.status == 503

    [record] = records_of(tmp_path, test, patience_s=0.05)
    assert counts(record) == (0, 0, 0, 503, "error")


def test_a_stream_that_an_error_ends_costs_what_came_before(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = start(server, stream=True)
        await until(lambda: len(server.engine.requests) == 1)
        for count in (1, 2):
            server.engine.step()
            await until(lambda: num_events(client) == count)  # noqa: B023
        server.engine.die()
        await client.done
        assert client.answered.status == 200 and b"error" in client.answered.body

    [record] = records_of(tmp_path, test, patience_s=0.05)
    assert counts(record) == (6, 2, 2, 503, "error")


def test_a_request_that_moves_to_another_replica_pays_its_prompt_once(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = start(server, stream=True)
        await until(lambda: len(server.engine.requests) == 1)
        server.engine.step()
        await until(lambda: num_events(client) == 1)
        server.connection.break_streams("replica")
        await until(lambda: len(server.engine.requests) == 2)
        server.engine.num_cached = 6  # the second time all of it is
        server.engine.running.set()
        await client.done

    assert counts(records_of(tmp_path, test)[0]) == (6, 2, 7, 200, "stop")


def test_what_is_refused_before_an_engine_is_asked_has_no_record(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        for fields in ({"model": "nobody"}, {"nonsense": 1}, {"prompt": ""}):
            assert (await server.post(COMPLETIONS, **body(**fields))).status in (400, 404)

    assert records_of(tmp_path, test) == []


# ---- other routes --------------------------------------------------------------------------


def test_reasoning_is_a_part_of_the_output(tmp_path: Path) -> None:
    said = "<think>Hm.</think>Yes."

    async def test(server: Server) -> None:
        messages = [{"role": "user", "content": f"SAY:{said}"}]
        for stream in (False, True):
            await server.post(CHAT, messages=messages, max_tokens=500, stream=stream)

    how = {"vocabulary": byte_vocabulary(THINKING), "ingress_settings": SETTINGS}
    for record in records_of(tmp_path, test, engine=dictated(), **how):
        assert record.output_tokens == len(said) + 1
        assert record.reasoning_tokens == len("<think>Hm.")


def test_embeddings_cost_their_texts_and_every_surface_is_named(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        await server.post("/v1/embeddings", input=["abc", "de"])
        await server.post("/generate", inputs=PROMPT)
        await server.post("/v1/responses", input="x")
        messages = [{"role": "user", "content": "x"}]
        await server.post("/v1/messages", messages=messages, max_tokens=3)

    use = EmbeddingUse("mean")
    records = records_of(tmp_path, test, embeddings=use)
    assert counts(records[0]) == (5, 4, 0, 200, "")
    routes = [record.route for record in records]
    assert routes == ["/v1/embeddings", "/generate", "/v1/responses", "/v1/messages"]


def test_a_record_says_who_asked_and_for_what(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        fields = {"model": "red", "prompt": PROMPT, "priority": 7, "max_tokens": 2}
        client = Client(
            server.api,
            "POST",
            COMPLETIONS,
            json.dumps(fields).encode(),
            ACME,
            [(b"x-request-id", b"mine")],
        )
        await client.done
        assert client.answered.status == 200

    tenants = Keyring(keys_file(tmp_path), Limits())
    [record] = records_of(tmp_path / "usage", test, tenants=tenants)
    assert (record.request_id, record.tenant, record.route) == ("mine", "acme", COMPLETIONS)
    assert (record.model, record.adapter, record.version) == ("base", "public/red", 1)
    assert (record.digest, record.priority, record.time_s) == ("red-digest", 7, 1e9)
    assert record.priority_class == "standard"
    assert record.key_id == key_id(bytes.fromhex(digest(ACME)))
    raw = b"".join(path.read_bytes() for path in (tmp_path / "usage").iterdir()).decode()
    assert ACME not in raw and digest(ACME) not in raw and record.key_id not in digest(ACME)


def test_two_requests_under_one_name_of_a_client_are_two(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        for _ in range(2):
            raw = json.dumps(body(model="base")).encode()
            await Client(server.api, "POST", COMPLETIONS, raw, None, [(b"x-request-id", b"a")]).done

    records = records_of(tmp_path, test)
    assert [r.request_id for r in records] == ["a", "a"] and len({r.id for r in records}) == 2
