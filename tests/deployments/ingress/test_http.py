"""HTTP as clients expect it: ids of requests, compressed bodies, HEAD and OPTIONS."""

import gzip
import json
import logging
import time
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config_sections import IngressSection
from deployments.ingress.api_route import ApiRoute
from deployments.ingress.http_errors import ApiError
from deployments.ingress.request_body import SLICE, Gunzip
from deployments.ingress.routes import build_api
from tests.deployments.support.fakes import Answered, Client, Server, in_server

COMPLETIONS = "/v1/completions"
BODY = json.dumps({"model": "base", "prompt": "abc"}).encode()
LIMIT = 10_000  # bytes of a body, in these servers


async def send(server: Server, method: str, path: str, raw: bytes, **headers: str) -> Answered:
    named = [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()]
    client = Client(server.api, method, path, raw, headers=named)
    await client.done
    return client.answered


# ---- ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("given_id", ["6f1c.a-b_c:d", "x" * 128])
def test_the_clients_id_comes_back_with_every_answer(given_id: str) -> None:
    async def test(server: Server) -> None:
        stream = json.dumps({"model": "base", "prompt": "abc", "stream": True}).encode()
        asked = [
            ("POST", COMPLETIONS, BODY, 200),
            ("POST", COMPLETIONS, stream, 200),
            ("POST", COMPLETIONS, b"{", 400),
            ("GET", "/health", b"", 200),
            ("GET", "/nowhere", b"", 404),
            ("GET", COMPLETIONS, b"", 405),
            ("OPTIONS", COMPLETIONS, b"", 204),
        ]
        for method, path, raw, status in asked:
            answer = await send(server, method, path, raw, x_request_id=given_id)
            assert (answer.status, answer.headers["x-request-id"]) == (status, given_id)

    in_server(test)


def test_an_id_that_is_not_safe_is_replaced_by_a_new_one() -> None:
    async def test(server: Server) -> None:
        ids: set[str] = set()
        for given_id in ("", "x" * 129, "a b", "ü", "a\nb"):
            answer = await send(server, "GET", "/health", b"", x_request_id=given_id)
            ids.add(answer.headers["x-request-id"])
        ids.add((await send(server, "GET", "/health", b"")).headers["x-request-id"])
        assert len(ids) == 6 and all(len(each) == 36 for each in ids)

    in_server(test)


def test_an_unexpected_error_is_logged_with_the_id(caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: Server) -> None:
        server.ingress.models.by_id.clear()  # an error of ours
        server.ingress.models.resolve = None  # type: ignore[method-assign, assignment]
        answer = await send(server, "POST", COMPLETIONS, BODY, x_request_id="mine")
        assert answer.status == 500 and answer.headers["x-request-id"] == "mine"
        [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert "mine" in record.getMessage()

    in_server(test)


def test_where_another_layer_sends_the_id_the_app_does_not() -> None:
    async def test(server: Server) -> None:
        api = build_api(server.ingress, sends_request_id=False)
        client = Client(api, "GET", "/health", b"", headers=[(b"x-request-id", b"a")])
        await client.done
        assert "x-request-id" not in client.answered.headers

    in_server(test)


# ---- compressed bodies ---------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "identity, gzip"])
def test_a_body_may_be_gzip(encoding: str) -> None:
    async def test(server: Server) -> None:
        raw = gzip.compress(BODY)
        answer = await send(server, "POST", COMPLETIONS, raw, content_encoding=encoding)
        assert answer.json["choices"][0]["text"] == "ABC"
        plain = await send(server, "POST", COMPLETIONS, BODY, content_encoding="identity")
        assert plain.status == 200

    in_server(test)


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip", "gzip, br", "x"])
def test_another_encoding_is_415_and_says_which_there_is(encoding: str) -> None:
    async def test(server: Server) -> None:
        answer = await send(server, "POST", COMPLETIONS, BODY, content_encoding=encoding)
        assert (answer.status, answer.headers["accept-encoding"]) == (415, "gzip")
        assert encoding in answer.error["message"] and "gzip" in answer.error["message"]

    in_server(test)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (BODY, "not gzip"),
        (zlib.compress(BODY), "not gzip"),
        (gzip.compress(BODY)[:-1], "ends before"),
        (b"", "ends before"),
        (gzip.compress(BODY) + b"x", "behind the end"),
        (gzip.compress(BODY) * 2, "behind the end"),
        (gzip.compress(BODY)[:-8] + bytes(8), "not gzip"),  # the checksum
    ],
    ids=range(7),
)
def test_what_is_no_gzip_is_400(raw: bytes, says: str) -> None:
    async def test(server: Server) -> None:
        answer = await send(server, "POST", COMPLETIONS, raw, content_encoding="gzip")
        assert answer.status == 400 and says in answer.error["message"]

    in_server(test)


def test_the_limit_holds_for_what_is_inflated() -> None:
    async def test(server: Server) -> None:
        filled = {"model": "base", "prompt": "abc", "user": "x"}
        for size, status in ((LIMIT, 200), (LIMIT + 1, 413)):
            filled["user"] = ""
            filled["user"] = "x" * (size - len(json.dumps(filled)))
            raw = gzip.compress(json.dumps(filled).encode())
            answer = await send(server, "POST", COMPLETIONS, raw, content_encoding="gzip")
            assert answer.status == status, answer.body

    in_server(test)


def test_a_bomb_is_413_and_costs_no_more_than_the_limit() -> None:
    bomb = gzip.compress(bytes(64 * 2**20), 9)
    assert len(bomb) < 100_000

    async def test(server: Server) -> None:
        began_s = time.process_time()
        answer = await send(server, "POST", COMPLETIONS, bomb, content_encoding="gzip")
        assert answer.status == 413
        assert time.process_time() - began_s < 0.05, "inflating all of it takes longer"

    in_server(test, ingress_settings=IngressSection(max_body_bytes=200_000))


def test_gzip_that_inflates_to_nothing_is_bounded_too() -> None:
    empty = zlib.compressobj(9, zlib.DEFLATED, 31)
    blocks = b"".join(empty.flush(zlib.Z_FULL_FLUSH) or b"" for _ in range(1))
    raw = blocks + b"\x00\x00\x00\xff\xff" * 4000  # stored blocks of no bytes

    async def test(server: Server) -> None:
        answer = await send(server, "POST", COMPLETIONS, raw, content_encoding="gzip")
        assert answer.status == 413

    in_server(test)


@settings(max_examples=30, deadline=None)
@given(
    st.binary(max_size=200),
    st.integers(1, 3 * SLICE // 100),
    st.lists(st.integers(1, 5000), min_size=1, max_size=5),
)
def test_any_cut_of_any_gzip_gives_the_same_bytes(
    data: bytes, repeats: int, cuts: list[int]
) -> None:
    data = data * repeats
    raw = gzip.compress(data, 1)
    gunzip = Gunzip()
    found: list[bytes] = []
    at = turn = 0
    while at < len(raw):
        size = cuts[turn % len(cuts)]
        found.extend(gunzip.push(raw[at : at + size]))
        at, turn = at + size, turn + 1
    gunzip.check_end()
    assert b"".join(found) == data and all(len(piece) <= SLICE for piece in found)
    with pytest.raises(ApiError):
        list(gunzip.push(b"x"))


# ---- methods -------------------------------------------------------------------------------


def test_head_is_get_without_the_body() -> None:
    async def test(server: Server) -> None:
        for path in ("/health", "/health/base", "/v1/models", "/v1/models/red", "/metrics"):
            got = await send(server, "GET", path, b"")
            head = await send(server, "HEAD", path, b"")
            assert head.body == b"" and head.status == got.status == 200
            if path != "/metrics":  # whose length changes
                assert head.headers["content-length"] == str(len(got.body))
        missing = await send(server, "HEAD", "/v1/models/nobody", b"")
        assert (missing.status, missing.body) == (404, b"")

    in_server(test)


def test_options_names_the_methods_of_every_route() -> None:
    async def test(server: Server) -> None:
        for route in server.api.routes:
            assert isinstance(route, ApiRoute)
            answer = await send(server, "OPTIONS", route.path.replace("{model_id:path}", "x"), b"")
            wanted = {"OPTIONS", *(("GET", "HEAD") if route.method == "GET" else ("POST",))}
            assert answer.status == 204 and answer.body == b""
            assert wanted <= set(answer.headers["allow"].split(", "))
        assert (await send(server, "OPTIONS", "/nowhere", b"")).status == 404

    in_server(test)


def test_a_page_may_send_what_it_asks_for_and_read_every_header() -> None:
    async def test(server: Server) -> None:
        wanted: dict[str, Any] = {
            "origin": "https://app.example",
            "access_control_request_method": "POST",
            "access_control_request_headers": "content-encoding, x-request-id, x-stainless-os",
        }
        answer = await send(server, "OPTIONS", COMPLETIONS, b"", **wanted)
        assert answer.status == 200 and answer.headers["x-request-id"]
        for name in ("content-encoding", "x-request-id", "x-stainless-os"):
            assert name in answer.headers["access-control-allow-headers"]
        asked = await send(server, "POST", COMPLETIONS, BODY, origin="https://app.example")
        assert asked.headers["access-control-expose-headers"] == "*"

    in_server(test, ingress_settings=IngressSection(cors_origins=["https://app.example"]))
