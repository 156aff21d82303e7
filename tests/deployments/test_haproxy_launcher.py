"""HAProxy behind the launcher, with the configuration that Ray writes, in front of a stub."""

import tests.deployments.support.quiet_ray  # noqa: F401

# isort: split
import http.client
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from deployments.haproxy_launcher import REQUEST_TIMEOUT_S, strict, write_launcher
from deployments.local.ray_head import free_port
from tests.deployments.support.processes import listening

ANSWER_S = 15.0
MODELS = "/v1/models"


class Echo(BaseHTTPRequestHandler):
    """Answers with the headers that reached it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps([[name.lower(), value] for name, value in self.headers.items()]).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None: ...


def rays_config(folder: Path, port: int, backend_ports: list[list[int]]) -> Path:
    """Write what Ray writes for these backends, each with the ports of its servers.

    With no backend it has not heard of an application yet.
    """
    config = HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        stats_port=free_port(),
        metrics_port=free_port(),
        log_target=str(folder / "log.sock"),
        nbthread=1,
        is_head=True,
        has_received_routes=bool(backend_ports),
        http_options=HTTPOptions(host="127.0.0.1", port=port),
    )
    backends = {
        f"app{number}": BackendConfig(
            f"app{number}",
            "/",
            app_name="reef",
            servers=[ServerConfig(f"server{each}", "127.0.0.1", each) for each in ports],
        )
        for number, ports in enumerate(backend_ports)
    }
    api = HAProxyApi(config, backends, str(folder / "haproxy.cfg"))
    api._generate_config_file_internal()
    return folder / "haproxy.cfg"


@dataclass
class Proxy:
    process: "subprocess.Popen[bytes]"
    port: int

    def get(
        self, headers: dict[str, str] | None = None, method: str = "GET"
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            connection.putrequest(method, MODELS)
            for name, value in (headers or {}).items():
                connection.putheader(name, value.encode("latin-1"))
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), answer.headers
        finally:
            connection.close()

    def post_in_parts(self, body: bytes) -> int:
        """The status of a request whose body comes a moment after its head."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            connection.putrequest("POST", MODELS)
            connection.putheader("content-length", str(len(body)))
            connection.endheaders()
            time.sleep(0.02)
            connection.send(body)
            return connection.getresponse().status
        finally:
            connection.close()

    def headers_that_arrive(self, headers: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in self.get(headers)[1] if name != "host"}


@contextmanager
def proxy(folder: Path, backend_ports: list[list[int]]) -> Iterator[Proxy]:
    folder.mkdir()
    port = free_port()
    launcher = folder / "launcher"
    write_launcher(launcher)
    command = [launcher, "-db", "-f", rays_config(folder, port, backend_ports)]
    environment = {**os.environ, "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher)}
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + ANSWER_S
        while not listening([process.pid]):
            assert process.poll() is None, (folder / "out").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield Proxy(process, port)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with stub(Echo) as port:
        folder = tmp_path_factory.mktemp("served") / "proxy"
        with proxy(folder, [[port]]) as running:
            yield running


def test_nothing_listens_beyond_loopback(served: Proxy) -> None:
    found = listening([served.process.pid])
    assert len(found) == 3, "requests, statistics, metrics"
    assert {host for host, _ in found} == {"127.0.0.1"}


@pytest.mark.parametrize(
    "name",
    [
        "x-request-timeout-seconds",
        "X-Request-Disconnect-Disabled",
        "x-session-id",
        "X_Session_Id",
        "serve_multiplexed_model_id",
        "Serve-Multiplexed-Model-Id",
        "serve_multiplexed-model_id",
    ],
)
def test_a_header_that_ray_would_obey_does_not_arrive(served: Proxy, name: str) -> None:
    found = served.headers_that_arrive({name: "0.001", "x-kept": "yes"})
    assert found.pop("x-kept") == "yes"
    assert name.lower() not in found


def test_a_session_arrives_under_a_name_that_ray_does_not_obey(served: Proxy) -> None:
    found = served.headers_that_arrive({"X-Session-Id": "s 1"})
    assert found["x-reef-session-id"] == "s 1" and "x-session-id" not in found


@pytest.mark.parametrize(
    ("value", "is_kept"),
    [
        ("6f1c.a-b_c:d", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("\xff", False),
        ("a b", False),
        ("a,b", False),
        ("", False),
    ],
)
def test_an_id_of_a_client_arrives_if_it_is_safe_to_log(
    served: Proxy, value: str, is_kept: bool
) -> None:
    found = served.headers_that_arrive({"x-request-id": value})["x-request-id"]
    assert (found == value) == is_kept
    assert is_kept or len(found) == 36, "a new one"


def test_a_connection_that_sends_no_whole_header_is_closed(served: Proxy) -> None:
    began_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
    assert REQUEST_TIMEOUT_S - 1 < time.monotonic() - began_s < 3 * REQUEST_TIMEOUT_S


@pytest.mark.parametrize("method", ["BREW", "get"])
def test_an_unknown_method_is_refused_with_the_error_body_of_all_others(
    served: Proxy, method: str
) -> None:
    status, document, headers = served.get(method=method)
    assert status == 405 and headers["allow"] == "GET, POST"
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert len(headers["x-request-id"]) == 36


def assert_unavailable(found: tuple[int, Any, http.client.HTTPMessage]) -> None:
    status, document, headers = found
    assert status == 503 and headers["retry-after"] == "2"
    assert headers["content-type"] == "application/json"
    assert document["error"]["code"] == "unavailable"
    assert len(headers["x-request-id"]) == 36


def test_before_there_is_an_application_the_answer_is_503_and_not_404(tmp_path: Path) -> None:
    with proxy(tmp_path / "proxy", []) as starting:
        assert_unavailable(starting.get())


def test_where_no_ingress_can_be_reached_the_answer_is_503(tmp_path: Path) -> None:
    with proxy(tmp_path / "proxy", [[free_port()]]) as lonely:
        assert_unavailable(lonely.get())


class Dying(Echo):
    """Is healthy, and ends each connection once it has read a request, as a killed process does."""

    num_seen = 0

    def do_GET(self) -> None:
        if self.path != MODELS:
            super().do_GET()
            return
        type(self).num_seen += 1
        self.close_connection = True


@contextmanager
def stub(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def test_a_request_whose_ingress_died_before_it_answered_goes_to_another(tmp_path: Path) -> None:
    Dying.num_seen = 0
    with (
        stub(Dying) as dead,
        stub(Echo) as alive,
        proxy(tmp_path / "proxy", [[dead, alive]]) as both,
    ):
        assert [both.get()[0] for _ in range(6)] == [200] * 6
        num_seen = Dying.num_seen
        assert num_seen > 0, "it was asked"
        assert [both.post_in_parts(b"x" * 10_000) for _ in range(6)] == [200] * 6
    assert Dying.num_seen > num_seen, "it was asked"


def test_a_request_that_ends_every_ingress_is_repeated_once(tmp_path: Path) -> None:
    Dying.num_seen = 0
    with stub(Dying) as one, stub(Dying) as two, proxy(tmp_path / "proxy", [[one, two]]) as none:
        assert_unavailable(none.get())
    assert Dying.num_seen == 2


def test_another_setting_for_repeats_stays(tmp_path: Path) -> None:
    config = rays_config(tmp_path, 1, [[2]]).read_text()
    assert "    retry-on conn-failure\n" in config, "Ray's default"
    own = config.replace("retry-on conn-failure", "retry-on none")
    assert "retry-on none" in strict(own, tmp_path / "page")


def test_a_configuration_is_changed_once(tmp_path: Path) -> None:
    config = rays_config(tmp_path, 1, [[2]]).read_text()
    changed = strict(config, tmp_path / "page")
    assert changed != config and strict(changed, tmp_path / "page") == changed


def test_a_public_address_of_requests_stays(tmp_path: Path) -> None:
    config = rays_config(tmp_path, 8000, [[2]]).read_text().replace("127.0.0.1:8000", "*:8000")
    assert "    bind *:8000\n" in strict(config, tmp_path / "page")


def test_a_configuration_of_another_form_is_refused(tmp_path: Path) -> None:
    config = rays_config(tmp_path, 1, [[2]]).read_text()
    with pytest.raises(ValueError, match="listen stats"):
        strict(config.replace("listen stats", "listen statistics"), tmp_path / "page")
