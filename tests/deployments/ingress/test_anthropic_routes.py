"""Anthropic's other routes and headers: counting tokens, models, keys, browsers."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deployments.config_sections import IngressSection
from deployments.ingress.browser_guard import BrowserGuard
from deployments.ingress.routes import build_api
from deployments.policy.admission import Limits
from deployments.tenants.tenants import Everybody, KeyRefused, Keyring
from tests.deployments.support.dictated import SETTINGS, THINKING, dictated, prompt_of
from tests.deployments.support.fakes import (
    Answered,
    Client,
    FakeStore,
    Server,
    byte_vocabulary,
    in_server,
)
from tests.deployments.support.keys import ACME, UMBRELLA, bearer, keys_file
from tests.deployments.support.loopback import listening, run_client

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
BODY = {"model": "base", "max_tokens": 9, "messages": [{"role": "user", "content": "SAY:Yes."}]}
VERSION = (b"anthropic-version", b"2023-06-01")
Header = tuple[bytes, bytes]


async def send(
    server: Server, method: str, path: str, headers: Sequence[Header] = (), body: Any = BODY
) -> Answered:
    raw = b"" if method == "GET" else json.dumps(body).encode()
    client = Client(server.api, method, path, raw, None, headers)
    await asyncio.wait_for(client.done, 10)
    return client.answered


def chatting(**how: Any) -> dict[str, Any]:
    vocabulary = byte_vocabulary(THINKING)
    return {"engine": dictated(), "vocabulary": vocabulary, "ingress_settings": SETTINGS, **how}


# ---- counting tokens -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "Be brief.", "thinking": {"type": "disabled"}},
        {"tools": [{"name": "f", "input_schema": {"type": "object"}}]},
        {"messages": [{"role": "user", "content": "é " * 2000}]},
    ],
)
def test_tokens_are_counted_as_the_prompt_has_them(fields: dict[str, Any]) -> None:
    async def test(server: Server) -> None:
        body = {**BODY, **fields}
        await server.post(MESSAGES, **body)
        body.pop("max_tokens")
        counted = await server.post(COUNT, **body)
        request = server.engine.requests[0]
        assert counted.json == {"input_tokens": len(request.prompt_token_ids)}
        assert len(server.engine.requests) == 1, prompt_of(request)

    in_server(test, **chatting())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": 9}, "Unknown field: max_tokens"),
        ({"messages": []}, "messages: must be a list of messages"),
        ({"messages": [{"role": "user", "content": "x" * 40_000}]}, "The prompt has 40028 tokens"),
        ({"output_config": {"effort": "low"}}, "output_config.effort: 'low' would do nothing"),
    ],
)
def test_what_cannot_be_counted_is_named(fields: dict[str, Any], named: str) -> None:
    async def test(server: Server) -> None:
        body = {**BODY, "max_tokens": None, **fields}
        answer = await server.post(COUNT, **body)
        assert answer.status == 400 and answer.json["type"] == "error"
        assert answer.error["message"].startswith(named), answer.body

    in_server(test, **chatting())


# ---- models --------------------------------------------------------------------------------


def test_models_are_listed_in_anthropics_form_for_its_clients() -> None:
    async def test(server: Server) -> None:
        base = {
            "type": "model",
            "id": "base",
            "display_name": "base",
            "created_at": "2001-09-09T01:46:40Z",
            "lifecycle": "active",
            "max_input_tokens": 128,
            "max_tokens": 128,
        }
        listed = (await send(server, "GET", "/v1/models", [VERSION])).json
        assert listed["data"][0] == base and listed["has_more"] is False
        assert [card["id"] for card in listed["data"]] == ["base", "blue", "red"]
        assert (listed["first_id"], listed["last_id"]) == ("base", "red")
        page = (await send(server, "GET", "/v1/models?limit=1&after_id=base", [VERSION])).json
        assert ([card["id"] for card in page["data"]], page["has_more"]) == (["blue"], True)
        assert (await send(server, "GET", "/v1/models/base", [VERSION])).json == base
        red = (await send(server, "GET", "/v1/models/red", [VERSION])).json
        assert (red["id"], red["max_tokens"]) == ("red", None)
        missing = await send(server, "GET", "/v1/models/nobody", [VERSION])
        assert (missing.status, missing.error["type"]) == (404, "not_found_error")
        refused = await send(server, "GET", "/v1/models?before_id=red", [VERSION])
        assert refused.status == 400 and refused.json["type"] == "error"
        assert (await send(server, "GET", "/v1/models")).json["object"] == "list"

    in_server(test, store=FakeStore("red", "blue"))


# ---- keys ----------------------------------------------------------------------------------


def api_key(key: str) -> Header:
    return (b"x-api-key", key.encode())


def authorization(key: str) -> Header:
    return (b"authorization", bearer(key).encode())


ROUTES = [("POST", MESSAGES), ("POST", COUNT), ("GET", "/v1/models"), ("GET", "/v1/models/base")]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_key_may_be_in_either_header(tmp_path: Path, method: str, path: str) -> None:
    body = {name: BODY[name] for name in ("model", "messages")}
    body |= {"max_tokens": 9} if path == MESSAGES else {}

    async def test(server: Server) -> None:
        for headers in (
            [api_key(ACME)],
            [authorization(ACME)],
            [api_key(ACME), authorization(ACME)],
        ):
            assert (await send(server, method, path, [VERSION, *headers], body)).status == 200
        for headers in (
            [],
            [api_key("reef-wrong")],
            [api_key(""), authorization("reef-wrong")],
            [api_key(ACME), authorization(UMBRELLA)],
            [api_key(ACME), (b"authorization", b"Basic eDp5")],
            [api_key(ACME), authorization(ACME + "x")],
        ):
            answer = await send(server, method, path, [VERSION, *headers], body)
            assert (answer.status, answer.error["type"]) == (401, "authentication_error")
            assert ACME not in answer.body.decode() and UMBRELLA not in answer.body.decode()

    in_server(test, **chatting(tenants=Keyring(keys_file(tmp_path), Limits())))


def test_openais_routes_do_not_look_at_the_other_header(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        body = {"model": "base", "prompt": "x"}
        keys = [api_key("a gateway's own"), authorization(ACME)]
        assert (await send(server, "POST", "/v1/completions", keys, body)).status == 200
        for path in ("/v1/completions", "/v1/chat/completions"):
            assert (await send(server, "POST", path, [api_key(ACME)], body)).status == 401
        assert (await send(server, "GET", "/v1/models", [api_key(ACME)])).status == 401

    in_server(test, **chatting(tenants=Keyring(keys_file(tmp_path), Limits())))


def test_an_open_server_looks_at_no_key() -> None:
    assert Everybody().identify(bearer("a"), "b").name == "public"


def test_two_keys_that_differ_are_refused_whoever_they_belong_to(tmp_path: Path) -> None:
    ring = Keyring(keys_file(tmp_path), Limits())
    assert ring.identify(bearer(ACME), ACME).name == "acme" == ring.identify(None, ACME).name
    assert ring.identify(bearer(UMBRELLA), "").name == "umbrella"
    with pytest.raises(KeyRefused, match="different keys"):
        ring.identify(bearer(ACME), UMBRELLA)


def test_limits_are_the_tenants_whatever_api_it_uses(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        statuses = [
            (await send(server, "POST", path, [api_key(ACME)], body)).status
            for path, body in ((MESSAGES, BODY), (COUNT, {**BODY, "max_tokens": None}))
        ]
        assert statuses == [200, 200]
        answer = await send(server, "POST", MESSAGES, [api_key(ACME)])
        assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["retry-after"]) > 0
        chat = await send(server, "POST", "/v1/chat/completions", [authorization(ACME)])
        assert chat.status == 429

    limits = Limits(requests_per_minute=2)
    in_server(test, **chatting(tenants=Keyring(keys_file(tmp_path), limits)))


# ---- browsers ------------------------------------------------------------------------------


def test_a_page_is_refused_in_anthropics_form() -> None:
    async def test(server: Server) -> None:
        api = build_api(server.ingress, BrowserGuard())
        client = Client(api, "POST", MESSAGES, b"{}", None, [(b"host", b"evil.example")])
        await client.done
        assert client.answered.status == 421
        assert client.answered.error["type"] == "invalid_request_error"
        wrong_method = await send(server, "PUT", MESSAGES)
        assert wrong_method.status == 405 and wrong_method.json["type"] == "error"

    in_server(test)


def test_pages_that_may_use_the_api_may_send_anthropics_headers() -> None:
    page = b"https://app.example"
    wanted = b"anthropic-dangerous-direct-browser-access,anthropic-version,content-type,x-api-key"

    async def test(server: Server) -> None:
        asked = [(b"access-control-request-method", b"POST"), (b"origin", page)]
        asked.append((b"access-control-request-headers", wanted))
        preflight = await send(server, "OPTIONS", MESSAGES, asked)
        assert preflight.status == 200
        assert preflight.headers["access-control-allow-origin"] == page.decode()
        allowed = preflight.headers["access-control-allow-headers"].replace(" ", "").split(",")
        assert set(wanted.decode().split(",")) <= set(allowed)
        answer = await send(server, "POST", MESSAGES, [VERSION, (b"origin", page)])
        assert answer.headers["access-control-allow-origin"] == page.decode()

    settings = IngressSection(max_body_bytes=2**20, cors_origins=[page.decode()])
    in_server(test, **chatting(ingress_settings=settings))


def test_the_paths_of_a_base_are_anthropics_too() -> None:
    async def test(server: Server) -> None:
        body = {**BODY, "model": None}
        answer = await send(server, "POST", f"/base{MESSAGES}", [VERSION], body)
        assert answer.status == 200 and answer.json["model"] == "base"

    in_server(test, **chatting())


def test_the_official_client_reads_blocks_and_their_streams() -> None:
    async def test(server: Server) -> None:
        async with listening(server.api) as url:
            await run_client("anthropic_client.py", url)

    in_server(test, **chatting(engine=dictated(dies_at="DIE"), patience_s=0.05))
