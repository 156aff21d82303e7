"""Keys and limits over HTTP: what the right and the wrong ones get."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from deployments.ingress.api_route import ApiRoute
from deployments.policy.admission import SECOND_NS, Limits
from deployments.tenants.tenants import Everybody, Keyring
from tests.deployments.support.fakes import (
    Client,
    FakeEngine,
    Server,
    in_server,
    until,
)
from tests.deployments.support.keys import ACME, PROMETHEUS, UMBRELLA, digest, keys_file

COMPLETIONS = "/v1/completions"


def limited(folder: Path, **limits: int) -> Keyring:
    tenants = {
        "acme": {"keys": [digest(ACME)], **limits},
        "umbrella": {"keys": [digest(UMBRELLA)]},
    }
    return Keyring(keys_file(folder, tenants=tenants), Limits())


ROUTES = [
    ("POST", COMPLETIONS, {"model": "base", "prompt": "x"}),
    ("POST", "/v1/chat/completions", {"model": "base", "messages": []}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/red", None),
]


@pytest.mark.parametrize("key", [None, "", "reef-wrong", ACME + "x", "sk-none"])
def test_every_tenant_route_is_401_without_a_valid_key(
    tmp_path: Path, key: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def test(server: Server) -> None:
        for method, path, body in ROUTES:
            answer = await server.call(method, path, body, key)
            assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == 'Bearer realm="reef"'
        assert server.engine.requests == []
        metrics = (await server.call("GET", "/metrics", key=PROMETHEUS)).body.decode()
        assert f'reef_requests_total{{route="{COMPLETIONS}",status="401"}} 1.0' in metrics
        for secret in (key, ACME, digest(ACME)):
            assert not secret or (secret not in metrics and secret not in caplog.text)

    in_server(test, tenants=limited(tmp_path))


def test_every_route_says_truly_whether_it_needs_a_key(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        for route in server.api.routes:
            assert isinstance(route, ApiRoute)
            path = route.path.replace("{model_id:path}", "red")
            answer = await server.call(route.method, path, {})
            needs_key = route.needs_key or route.doc.needs_metrics_key
            assert (answer.status == 401) == needs_key, (route.method, path)

    in_server(test, tenants=limited(tmp_path))


def test_health_needs_no_key_and_metrics_need_their_own(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        assert (await server.call("GET", "/health")).status == 200
        for key in (None, ACME, "x"):
            assert (await server.call("GET", "/metrics", key=key)).status == 401
        assert (await server.call("GET", "/metrics", key=PROMETHEUS)).status == 200
        assert (await server.post(COMPLETIONS, key=PROMETHEUS, prompt="x")).status == 401

    in_server(test, tenants=limited(tmp_path))
    ring = Keyring(tmp_path / "keys.yaml", Limits(), metrics_are_open=True)
    ring.check_metrics(None)


def test_a_valid_key_is_served_and_its_tenant_scopes_the_prefix_cache(
    tmp_path: Path,
) -> None:
    async def test(server: Server) -> None:
        for key in (ACME, UMBRELLA):
            answer = await server.post(COMPLETIONS, key=key, prompt="x")
            assert answer.json["choices"][0]["text"] == "X"
        assert [r.tenant for r in server.engine.requests] == ["acme", "umbrella"]

    in_server(test, tenants=limited(tmp_path))


def test_without_keys_every_client_is_the_public_tenant() -> None:
    async def test(server: Server) -> None:
        for key in (None, "none"):
            assert (await server.post(COMPLETIONS, key=key, prompt="x")).status == 200
        assert {r.tenant for r in server.engine.requests} == {"public"}

    in_server(test)


def test_requests_beyond_the_rate_are_429_until_retry_after_has_passed(tmp_path: Path) -> None:
    now_ns = [7]

    async def test(server: Server) -> None:
        async def status(key: str = ACME, model: str = "base") -> int:
            return (await server.post(COMPLETIONS, key=key, model=model, prompt="x")).status

        assert [await status(), await status(model="nobody")] == [200, 404]
        refused = await server.post(COMPLETIONS, key=ACME, prompt="x")
        assert refused.status == 429 and refused.error["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "30" and "2 requests per minute" in str(
            refused.error["message"]
        )
        assert await status(UMBRELLA) == 200, "one tenant's limit is no other's"
        now_ns[0] += 29 * SECOND_NS
        assert await status() == 429
        now_ns[0] += SECOND_NS
        assert [await status(), await status()] == [200, 429]
        text = (await server.call("GET", "/metrics", key=PROMETHEUS)).body.decode()
        labels = 'limit="requests_per_minute",tenant="acme"'
        assert f"reef_refused_requests_total{{{labels}}} 3.0" in text

    in_server(test, tenants=limited(tmp_path, requests_per_minute=2), clock_ns=lambda: now_ns[0])


def test_in_open_mode_all_clients_share_the_configured_limits() -> None:
    async def test(server: Server) -> None:
        statuses = [(await server.call("GET", "/v1/models")).status for _ in range(3)]
        assert statuses == [200, 200, 429]

    in_server(test, tenants=Everybody(Limits(requests_per_minute=2)), clock_ns=lambda: 0)


def start(server: Server, stream: bool = True, **fields: Any) -> Client:
    body = {"model": "base", "prompt": "abc", "stream": stream, **fields}
    return Client(server.api, "POST", COMPLETIONS, json.dumps(body).encode(), ACME)


ENDINGS = ["it is finished", "the client hangs up", "the call is cancelled", "the engine dies"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_concurrency_place_is_freed_however_its_request_ends(
    tmp_path: Path, ending: str, stream: bool
) -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        first = start(server, stream)
        await until(lambda: len(server.engine.requests) == 1)
        refused = await server.post(COMPLETIONS, key=ACME, prompt="y")
        assert refused.status == 429 and refused.error["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        others = [("GET", "/health", None), ("GET", "/metrics", PROMETHEUS)]
        for method, path, key in others:
            assert (await server.call(method, path, key=key)).status == 200
        if ending == "the client hangs up":
            first.hang_up()
        elif ending == "the call is cancelled":
            first.done.cancel()
        elif ending == "the engine dies":
            server.engine.die()
        server.engine.running.set()
        await asyncio.gather(first.done, return_exceptions=True)
        server.engine.is_up = True
        assert (await server.post(COMPLETIONS, key=ACME, prompt="z")).status == 200

    in_server(test, engine=FakeEngine(), tenants=limited(tmp_path, max_concurrent_requests=1))


@pytest.mark.parametrize("body", [{"prompt": ""}, {"model": "nobody"}, {"nonsense": 1}])
def test_a_refused_request_frees_its_concurrency_place(
    tmp_path: Path, body: dict[str, Any]
) -> None:
    async def test(server: Server) -> None:
        for _ in range(3):
            refused = await server.post(COMPLETIONS, key=ACME, **{"prompt": "x", **body})
            assert refused.status in (400, 404)
        assert (await server.post(COMPLETIONS, key=ACME, prompt="x")).status == 200

    in_server(test, tenants=limited(tmp_path, max_concurrent_requests=1))


def test_a_tenants_concurrency_counts_prompts_times_n(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        too_many = await server.post(COMPLETIONS, key=ACME, prompt=["a", "b"], n=3)
        assert too_many.status == 400
        assert "6 answers" in too_many.error["message"] and "5" in too_many.error["message"]
        server.engine.running.clear()
        first = start(server, prompt=["a", "b"], n=2)
        await until(lambda: len(server.engine.requests) == 2)
        refused = await server.post(COMPLETIONS, key=ACME, prompt="y", n=2)
        assert refused.status == 429 and refused.error["code"] == "rate_limit_exceeded"
        second = start(server)
        await until(lambda: len(server.engine.requests) == 3)
        server.engine.running.set()
        await asyncio.gather(first.done, second.done)
        assert (await server.post(COMPLETIONS, key=ACME, prompt="z", n=5)).status == 200

    in_server(test, tenants=limited(tmp_path, max_concurrent_requests=5))


def test_the_engine_is_told_a_tenants_weight(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        for key in (ACME, UMBRELLA):
            body = {"model": "base", "prompt": "x", "max_tokens": 1}
            assert (await server.call("POST", COMPLETIONS, body, key)).status == 200
        assert [request.weight for request in server.engine.requests] == [4.0, 1.0]

    tenants = {
        "acme": {"keys": [digest(ACME)], "weight": 4},
        "umbrella": {"keys": [digest(UMBRELLA)]},
    }
    in_server(test, tenants=Keyring(keys_file(tmp_path, tenants=tenants), Limits()))


RATE = "x-ratelimit-"


def test_every_answer_of_a_limited_tenant_says_what_is_left(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        left: list[tuple[str, str]] = []
        for model, stream in (("base", False), ("base", True), ("nobody", False), ("base", False)):
            answer = await server.post(
                COMPLETIONS, key=ACME, model=model, prompt="abc", max_tokens=4, stream=stream
            )
            assert answer.headers[f"{RATE}limit-requests"] == "3"
            assert answer.headers[f"{RATE}limit-tokens"] == "100"
            assert answer.headers[f"{RATE}reset-requests"].endswith("s")
            names = (f"{RATE}remaining-requests", f"{RATE}remaining-tokens")
            left.append((answer.headers[names[0]], answer.headers[names[1]]))
        assert answer.status == 429
        assert [requests for requests, _ in left] == ["2", "1", "0", "0"]
        used = 3 + 4  # the answer's end is a token, too
        assert int(left[3][1]) == 100 - 2 * used, left
        other = await server.post(COMPLETIONS, key=UMBRELLA, prompt="x")
        assert not any(name.startswith(RATE) for name in other.headers)

    limits = {"requests_per_minute": 3, "tokens_per_day": 100}
    in_server(test, tenants=limited(tmp_path, **limits), clock_ns=lambda: 7)


@pytest.mark.parametrize("ending", ENDINGS[:3])
def test_tokens_that_were_not_used_come_back_however_a_request_ends(
    tmp_path: Path, ending: str
) -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        first = start(server, max_tokens=90)
        await until(lambda: len(server.engine.requests) == 1)
        refused = await server.post(COMPLETIONS, key=ACME, prompt="y", max_tokens=90)
        assert refused.status == 429 and "tokens per day" in refused.error["message"]
        assert int(refused.headers["retry-after"]) > 1
        if ending == "the client hangs up":
            first.hang_up()
        elif ending == "the call is cancelled":
            first.done.cancel()
        server.engine.running.set()
        await asyncio.gather(first.done, return_exceptions=True)
        answer = await server.post(COMPLETIONS, key=ACME, prompt="z", max_tokens=90)
        assert answer.status == 200

    in_server(test, engine=FakeEngine(), tenants=limited(tmp_path, tokens_per_day=100))


def test_a_request_that_is_refused_costs_no_tokens(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        body = {"prompt": "x", "max_tokens": 90}
        refused = await server.post(COMPLETIONS, key=ACME, priority_class="interactive", **body)
        assert refused.status == 403
        assert (await server.post(COMPLETIONS, key=ACME, **body)).status == 200

    in_server(test, engine=FakeEngine(), tenants=limited(tmp_path, tokens_per_day=100))
