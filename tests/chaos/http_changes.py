"""Changes of the HTTP around a body: headers, routes, encodings, and clients that leave."""

import gzip
from collections.abc import Callable
from dataclasses import replace
from random import Random

from tests.chaos.case import JSON, Case, Header


def _with(case: Case, *headers: Header, is_http: bool = True) -> Case:
    return replace(case, headers=(*case.headers, *headers), is_http=is_http)


def _content_type(rng: Random, case: Case) -> Case:
    kinds = (b"text/plain", b"application/json; charset=utf-16", b"multipart/form-data; boundary=x")
    more = (b"application/x-www-form-urlencoded", b"", b"\xff\xfe", b"application/json, text/plain")
    headers = rng.choice(((), ((b"Content-Type", rng.choice((*kinds, *more))),), (JSON, JSON)))
    return replace(case, headers=headers)


def _odd_header(rng: Random, case: Case) -> Case:
    return _with(
        case,
        rng.choice(
            (
                (b"X-Request-Id", b"\xff\xfe"),
                (b"X-Request-Id", b"a" * 300),
                (b"X-Request-Timeout-Seconds", b"0.0001"),
                (b"X-Request-Timeout-Seconds", b"nan"),
                (b"Serve_Multiplexed_Model_Id", b"x"),
                (b"X-Session-Id", b"\x80"),
                (b"Content-Encoding", b"br"),
                (b"Accept", b"text/html;q=\xff"),
                (b"Accept-Encoding", b"gzip, deflate, br"),
                (b"Origin", b"https://evil.example"),
                (b"Referer", b"\xe2\x98\x83" * 100),
                (b"Cookie", b"a=b; " * 500),
                (b"X-Forwarded-For", b"256.256.256.256"),
                (b"Forwarded", b'for="_\\"x"'),
                (b"traceparent", b"00-" + b"z" * 32),
                (b"X-" + b"y" * 200, b"z" * 4000),
                (b"Range", b"bytes=0-0"),
                (b"If-None-Match", b"*"),
                (b"TE", b"trailers"),
            )
        ),
    )


def _odd_host(rng: Random, case: Case) -> Case:
    host = rng.choice((b"evil.example", b"localhost", b"[::1]:80", b"127.0.0.1:99999", b"a" * 300))
    return _with(case, (b"Host", host), is_http=host != b"127.0.0.1:99999")


def _not_quite_http(rng: Random, case: Case) -> Case:
    headers: tuple[Header, ...] = rng.choice(
        (
            ((b"Content-Length", b"-1"),),
            ((b"Content-Length", b"1"), (b"Content-Length", b"2")),
            ((b"Content-Length", str(len(case.body) // 2).encode()),),
            ((b"Transfer-Encoding", b"chunked"),),
            ((b"Transfer-Encoding", b"gzip, chunked"),),
            ((b"Transfer-Encoding", b"chunked"), (b"Content-Length", b"5")),
            ((b"X-Big", b"z" * 20_000),),
            ((b"Bad Name", b"x"),),
            ((b"X-Null", b"a\0b"),),
            ((b"Host", b""),),
            ((b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")),
            ((b"Expect", b"something-else"),),
        )
    )
    return _with(case, *headers, is_http=False)


def _chunked(rng: Random, case: Case) -> Case:
    """The same body in chunks, which servers must take."""
    size = rng.choice((1, 7, 1000)) if len(case.body) < 10_000 else 50_000
    pieces = [case.body[at : at + size] for at in range(0, len(case.body), size)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return replace(_with(case, (b"Transfer-Encoding", b"chunked")), body=body)


def _route(rng: Random, case: Case) -> Case:
    path = rng.choice(
        (
            *(b"/", b"/v1", b"/v1/", b"/v1/models", b"/v1/models/", b"/v1/models/red", b"/health"),
            *(
                b"/v1/models/%ff%fe",
                b"/v1/models/%00",
                b"/v1/models/a%2Fb",
                b"/v1/models/../health",
            ),
            *(b"/v1/models?limit=0", b"/v1/models?limit=9&after=%F0%9F", b"/v1/models?after=red"),
            *(
                b"/v1/chat/completions/",
                b"/v1/completions?x=y",
                b"/V1/completions",
                b"//v1//models",
            ),
            *(b"/v1/embeddings", b"/v1/responses", b"/docs", b"/openapi.json", b"/-/nothing"),
            *(b"/tokenize", b"/detokenize", b"/generate", b"/generate_stream", b"/info"),
            *(b"/v1/load_lora_adapter", b"/unload_lora_adapter", b"/nobody/v1/completions"),
            *(b"/v1/models/" + b"a" * 3000, b"/" + b"b/" * 500, b"/%", b"/%zz", b"/metrics"),
        )
    )
    methods = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW")
    return replace(case, path=path, method=rng.choice(methods))


def _gzip(rng: Random, case: Case) -> Case:
    body = gzip.compress(case.body, mtime=0)
    return replace(_with(case, (b"Content-Encoding", b"gzip")), body=body)


def _sends_less(rng: Random, case: Case) -> Case:
    return replace(case, num_sent=rng.randrange(len(case.body) + 1))


def _leaves(rng: Random, case: Case) -> Case:
    return replace(case, leaves_after=rng.choice((0, 1, 2, 5)))


HTTP: tuple[tuple[str, Callable[[Random, Case], Case]], ...] = (
    ("content type", _content_type),
    ("odd header", _odd_header),
    ("odd host", _odd_host),
    ("not quite HTTP", _not_quite_http),
    ("chunked", _chunked),
    ("another route", _route),
    ("another route", _route),
    ("compressed", _gzip),
    ("the client leaves while it sends", _sends_less),
    ("the client leaves amid the answer", _leaves),
    ("the client leaves amid the answer", _leaves),
)
