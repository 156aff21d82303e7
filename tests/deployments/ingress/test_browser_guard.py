"""What an open server on loopback takes, and what a web page cannot make a browser send to it."""

import asyncio
from typing import Any

import pytest

from deployments.config import load_config
from deployments.ingress.browser_guard import BrowserGuard
from deployments.ingress.routes import build_api
from tests.deployments.support.fakes import Answered, Client, Server, in_server

COMPLETIONS = "/v1/completions"
BODY = b'{"model": "base", "prompt": "hi"}'
GUARD = BrowserGuard(["Proxy.example"])


def scope(method: str, *headers: tuple[str, str]) -> dict[str, Any]:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return {"type": "http", "method": method, "headers": raw}


def status(method: str, *headers: tuple[str, str]) -> int | None:
    refusal = GUARD.refusal(scope(method, *headers))
    return None if refusal is None else refusal.status


OURS = "localhost localhost:8000 LOCALHOST:1 127.0.0.1:8000 127.1.2.3 [::1]:8000"
THEIRS = "evil.example evil.example:8000 localhost.evil.example 127.0.0.1.evil.example \xff [ :1"
BEYOND = "192.168.0.1:8000 [fe80::1]:8000 0.0.0.0:8000"


@pytest.mark.parametrize("host", [*OURS.split(), "proxy.example", "PROXY.example:443"])
def test_a_name_of_this_machine_passes(host: str) -> None:
    assert status("GET", ("host", host)) is None


@pytest.mark.parametrize("host", [*THEIRS.split(), *BEYOND.split(), "", "x" * 10_000])
def test_another_name_is_421(host: str) -> None:
    refusal = GUARD.refusal(scope("GET", ("host", host)))
    assert refusal is not None and refusal.status == 421
    assert "ingress.hosts" in refusal.message and len(refusal.message) < 500


@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON ; charset=utf-8"])
def test_json_passes(media_type: str) -> None:
    assert status("POST", ("host", "localhost"), ("content-type", media_type)) is None


@pytest.mark.parametrize(
    "headers",
    [
        [],  # a Blob without a type
        [("content-type", "")],
        [("content-type", "text/plain")],
        [("content-type", "text/plain;application/json")],
        [("content-type", "application/x-www-form-urlencoded")],
        [("content-type", "multipart/form-data; boundary=application/json")],
    ],
)
def test_what_a_form_can_send_is_415(headers: list[tuple[str, str]]) -> None:
    assert status("POST", ("host", "localhost"), *headers) == 415


def test_a_client_without_a_host_is_no_browser() -> None:
    assert status("GET") is None


class Page(Client):
    """A request with headers of the test's own."""

    def __init__(self, api: Any, *headers: tuple[str, str]) -> None:
        async def with_headers(scope: Any, receive: Any, send: Any) -> None:
            raw = [(name.encode(), value.encode()) for name, value in headers]
            await api({**scope, "headers": raw}, receive, send)

        super().__init__(with_headers, "POST", COMPLETIONS, BODY)

    async def answer(self) -> Answered:
        await asyncio.wait_for(self.done, 10)
        return self.answered


def test_a_refused_request_reaches_no_route_and_is_counted() -> None:
    async def test(server: Server) -> None:
        api = build_api(server.ingress, GUARD)
        json_type, text = ("content-type", "application/json"), ("content-type", "text/plain")
        here, there = ("host", "127.0.0.1:8000"), ("host", "evil.example")
        answers = [
            await Page(api, *headers).answer()
            for headers in ([here, json_type], [here, text], [there, json_type])
        ]
        assert [answer.status for answer in answers] == [200, 415, 421]
        assert answers[2].error["code"] == "misdirected_request"
        assert len(server.engine.requests) == 1
        scrape = (await server.call("GET", "/metrics")).body.decode()
        assert 'reef_requests_total{route="none",status="421"} 1.0' in scrape

    in_server(test)


@pytest.mark.parametrize(
    ("tenancy", "is_guarded"),
    [
        ({}, True),
        ({"allow_open_on_network": True}, False),
        ({"mode": "keys", "keys_file": "keys.yaml"}, False),
    ],
)
def test_only_an_open_server_on_loopback_is_guarded(
    tenancy: dict[str, Any], is_guarded: bool
) -> None:
    config = load_config({"models": [{"id": "m", "source": "somewhere"}], "tenancy": tenancy})
    assert (config.browser_hosts is not None) == is_guarded
