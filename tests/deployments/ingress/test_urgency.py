"""Classes and deadlines over HTTP, from the header to the engine."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from deployments.policy.admission import Limits
from deployments.tenants.tenants import Keyring
from engine.messages import EngineStats
from engine.scheduler.classes import PriorityClass
from tests.deployments.support.fakes import Answered, Client, Server, in_server, until
from tests.deployments.support.keys import ACME, UMBRELLA, digest, keys_file

COMPLETIONS = "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/generate": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
}


def ask(
    server: Server, headers: dict[str, str], path: str = COMPLETIONS, key: str = "", **body: Any
) -> Client:
    document = {"model": "base", **BODIES[path], **body}
    if path == "/generate":
        del document["model"]
    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    if key:
        named.append((b"authorization", f"Bearer {key}".encode()))
    return Client(server.api, "POST", path, json.dumps(document).encode(), headers=named)


async def answer(
    server: Server, headers: dict[str, str], path: str = COMPLETIONS, key: str = "", **body: Any
) -> Answered:
    client = ask(server, headers, path, key, **body)
    await asyncio.wait_for(client.done, 10)
    return client.answered


@pytest.mark.parametrize("path", BODIES)
def test_the_class_of_a_header_reaches_the_engine(path: str) -> None:
    async def test(server: Server) -> None:
        for name in (None, "interactive", "batch"):
            headers = {} if name is None else {"x-priority-class": name}
            assert (await answer(server, headers, path)).status == 200
            wanted = "standard" if name is None else name
            assert server.engine.requests[-1].priority_class == PriorityClass[wanted.upper()]

    in_server(test)


def test_the_field_goes_before_the_header() -> None:
    async def test(server: Server) -> None:
        for path in (COMPLETIONS, "/v1/chat/completions"):
            found = await answer(
                server, {"x-priority-class": "batch"}, path, priority_class="interactive"
            )
            assert found.status == 200
            assert server.engine.requests[-1].priority_class is PriorityClass.INTERACTIVE

    in_server(test)


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({"x-priority-class": "urgent"}, "interactive, standard, batch, not 'urgent'"),
        ({"x-request-timeout": "soon"}, "seconds in [0.001, 86400], not 'soon'"),
        ({"x-request-timeout": "0"}, "not '0'"),
        ({"x-request-timeout": "nan"}, "not 'nan'"),
        ({"x-request-timeout": "-1"}, "not '-1'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(headers: dict[str, str], told: str) -> None:
    async def test(server: Server) -> None:
        found = await answer(server, headers)
        assert found.status == 400 and told in found.error["message"]
        assert found.error["param"] == next(iter(headers)) and not server.engine.requests

    in_server(test)


def test_a_tenant_gets_no_higher_class_than_its_own(tmp_path: Path) -> None:
    tenants = {
        "acme": {"keys": [digest(ACME)], "max_priority_class": "batch"},
        "umbrella": {"keys": [digest(UMBRELLA)]},
    }

    async def test(server: Server) -> None:
        found = await answer(server, {"x-priority-class": "standard"}, key=ACME)
        assert (found.status, found.error["code"]) == (403, "permission_denied")
        assert "standard is above the tenant's highest, batch" in found.error["message"]
        found = await answer(server, {}, key=UMBRELLA, priority_class="interactive")
        assert found.status == 403
        assert not server.engine.requests
        assert (await answer(server, {}, key=ACME)).status == 200
        assert server.engine.requests[-1].priority_class is PriorityClass.BATCH
        assert (await answer(server, {}, key=UMBRELLA)).status == 200
        assert server.engine.requests[-1].priority_class is PriorityClass.STANDARD

    in_server(test, tenants=Keyring(keys_file(tmp_path, tenants=tenants), Limits()))


# ---- deadlines ----


async def is_empty(server: Server) -> None:
    await until(lambda: not server.link.num_live and not server.replica._requests.by_id)
    assert server.replica._requests.num_open == 0 and not server.replica._requests.flows


@pytest.mark.parametrize("is_tenants", [False, True], ids=["header", "tenant"])
def test_a_request_whose_time_is_over_ends_and_is_gone(tmp_path: Path, is_tenants: bool) -> None:
    tenants = {"acme": {"keys": [digest(ACME)], **({"max_ttft_s": 0.05} if is_tenants else {})}}

    async def test(server: Server) -> None:
        server.engine.running.clear()
        headers = {} if is_tenants else {"x-request-timeout": "0.05"}
        found = await answer(server, headers, key=ACME)
        assert (found.status, found.error["code"]) == (503, "deadline_exceeded")
        assert found.headers["retry-after"] == "1"
        assert server.engine.aborted == [server.engine.requests[0].request_id]
        await is_empty(server)
        server.engine.running.set()
        assert (await answer(server, {"x-request-timeout": "5"}, key=ACME)).status == 200

    in_server(test, tenants=Keyring(keys_file(tmp_path, tenants=tenants), Limits()))


def test_an_answer_that_has_begun_is_not_cut_off() -> None:
    async def test(server: Server) -> None:
        body = {"stream": True, "max_tokens": 40, "prompt": "a" * 40}
        client = ask(server, {"x-request-timeout": "0.2"}, **body)
        await until(lambda: b"data:" in client.answered.body)
        server.engine.running.clear()
        await asyncio.sleep(0.3)
        server.engine.running.set()
        await asyncio.wait_for(client.done, 10)
        assert client.answered.status == 200 and not server.engine.aborted
        await is_empty(server)

    in_server(test)


def test_what_would_come_too_late_is_refused_at_once() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        server.engine.totals = EngineStats(
            tokens_per_s=10.0, step_s=0.05, row_s=0.005, queued_tokens=100
        )
        waiting = ask(server, {}, prompt="a" * 100)
        await until(lambda: len(server.engine.requests) == 1)
        found = await answer(server, {"x-request-timeout": "3"}, prompt="a" * 20)
        assert (found.status, found.error["code"]) == (429, "overloaded")
        assert "and at most" in found.error["message"]
        assert int(found.headers["retry-after"]) >= 8, "10 s of prompts and 2 s of its own"
        assert len(server.engine.requests) == 1
        server.engine.totals = EngineStats()
        server.engine.running.set()
        await asyncio.wait_for(waiting.done, 10)
        assert waiting.answered.status == 200

    in_server(test)


def test_a_full_queue_is_refused_to_who_filled_it(tmp_path: Path) -> None:
    tenants = {"acme": {"keys": [digest(ACME)]}, "umbrella": {"keys": [digest(UMBRELLA)]}}

    async def test(server: Server) -> None:
        server.engine.running.clear()
        flood = [ask(server, {}, key=ACME) for _ in range(6)]
        await until(lambda: len(server.engine.requests) == 6)
        found = await answer(server, {}, key=ACME)
        assert (found.status, found.error["code"]) == (429, "overloaded")
        guests = [ask(server, {}, key=UMBRELLA) for _ in range(3)]
        await until(lambda: len(server.engine.requests) == 9)
        assert server.engine.aborted == [r.request_id for r in server.engine.requests[5:2:-1]]
        found = await answer(server, {}, key=UMBRELLA)
        assert found.status == 429, "it has its share of the queue"
        server.engine.running.set()
        for client in (*flood, *guests):
            await asyncio.wait_for(client.done, 10)
        assert [client.answered.status for client in flood] == [200] * 3 + [429] * 3
        assert [client.answered.status for client in guests] == [200] * 3
        await is_empty(server)

    in_server(test, tenants=Keyring(keys_file(tmp_path, tenants=tenants), Limits()), max_requests=6)


def test_all_sessions_of_a_tenant_share_its_share() -> None:
    async def test(server: Server) -> None:
        for number in range(3):
            assert (await answer(server, {"x-session-id": f"agent-{number}"})).status == 200
        assert {(r.tenant, r.weight, r.priority_class) for r in server.engine.requests} == {
            ("public", 1.0, PriorityClass.STANDARD)
        }

    in_server(test)
