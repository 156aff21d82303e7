"""Forward requests from a client to a real S3 server, and inject faults.

Signatures stay valid, because a server checks the Host header it is shown and this one is kept.
"""

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    num_sent: int | None = None  # bytes of the body after which the connection breaks


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]


Forward = Callable[[], Reply]
Fault = Callable[[Request, Forward], Reply | None]  # None: the connection breaks


def no_fault(request: Request, forward: Forward) -> Reply | None:
    return forward()


class Forwarder:
    """Passes every request to `fault`, which decides the answer, and lists it in `requests`."""

    def __init__(self, upstream_url: str, fault: Fault = no_fault) -> None:
        self.fault = fault
        self.requests: list[Request] = []
        self._is_closed = False
        upstream = urlsplit(upstream_url).netloc
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                request = Request(self.command, self.path, dict(self.headers.items()))
                outer.requests.append(request)
                body = self.rfile.read(int(request.headers.get("Content-Length", 0)))
                reply = outer.fault(request, lambda: forward(upstream, request, body))
                if reply is None or outer._is_closed:
                    self.close_connection = True
                    return
                self.send_response_only(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body[: reply.num_sent])
                self.close_connection |= reply.num_sent is not None

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

            def log_message(self, format: str, *arguments: Any) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> "Forwarder":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._is_closed = True  # for connections that are open
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def forward(upstream: str, request: Request, body: bytes) -> Reply:
    connection = http.client.HTTPConnection(upstream, timeout=30)
    try:
        headers = {k: v for k, v in request.headers.items() if k.lower() != "expect"}
        connection.request(request.method, request.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        kept = {k: v for k, v in answer.getheaders() if k.lower() != "transfer-encoding"}
        length = {} if request.method == "HEAD" else {"content-length": str(len(content))}
        return Reply(answer.status, {k.lower(): v for k, v in kept.items()} | length, content)
    finally:
        connection.close()
