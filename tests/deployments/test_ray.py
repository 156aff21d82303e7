"""The whole server on a real Ray cluster: what only real processes and real sockets can show."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapter_store.store import AdapterStore
from deployments.local.ray_head import free_port
from tests.deployments.support.processes import assert_gone, command, descendants, listening, stop
from tests.deployments.support.tiny_models import make_adapter, make_base
from tests.documents import Block, blocks

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
MAX_POSITION = 8192  # long enough that nothing ends by itself while a test watches
COMPLETIONS = "/v1/completions"
JSON = {"Content-Type": "application/json"}


@dataclass
class Running:
    process: "subprocess.Popen[bytes]"
    port: int
    log: Path
    seen_at_start: set[int]  # statuses of /health before the server said that it serves

    def request(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), JSON)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        status, raw = self.request("POST", path, {"model": "tiny", **body})
        return status, json.loads(raw)

    def gauge(self, name: str) -> float:
        lines = self.request("GET", "/metrics")[1].decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))

    def stream(self, **body: Any) -> http.client.HTTPConnection:
        """A connection whose answer has begun to arrive."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        fields = {"model": "tiny", "prompt": "x", "stream": True, "ignore_eos": True, **body}
        connection.request("POST", COMPLETIONS, json.dumps(fields), JSON)
        return connection

    def engine_pid(self) -> int:
        found = [pid for pid in descendants(self.process.pid) if "engine.process" in command(pid)]
        assert len(found) == 1
        return found[0]


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    make_base(folder / "base", MAX_POSITION)
    store = AdapterStore(f"file://{folder}/store", folder / "cache", 10**9)
    fingerprint = store.register_base(folder / "base")
    for seed, name in enumerate(("red", "blue")):
        make_adapter(folder / name, folder / "base", 4 + 4 * seed, seed)
        store.publish(folder / name, "public", name, fingerprint)
    config, log, port = folder / "config.yaml", folder / "log", free_port()
    config.write_text(yaml.safe_dump(configuration()))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "reef",
                "serve",
                "--config",
                config,
                "--port",
                str(port),
            ],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    running = Running(process, port, log, set())

    def has_started() -> bool:
        with suppress(ConnectionRefusedError):
            running.seen_at_start.add(running.request("GET", "/health")[0])
        return b"curl" in log.read_bytes() or process.poll() is not None

    try:
        wait_for(has_started, 90, "serving")
        assert process.poll() is None, log.read_text()
        yield running
    finally:
        family = descendants(process.pid)
        assert stop(process, family) == 0, log.read_text()
        assert_gone(family)


def configuration() -> dict[str, Any]:
    engine = {"device": "cpu", "memory_bytes": "64MiB", "num_threads": 1}
    args = {
        "models": [
            {
                "id": "tiny",
                "source": "base",
                "engine": engine,
                "embeddings": {"pooling": "mean"},
            }
        ],
        "adapters": {"root": "file://store", "disk_path": "cache"},
    }
    entry = {"name": "reef", "import_path": "deployments.app:build_app", "args": args}
    return {"applications": [entry]}


def test_nothing_listens_beyond_loopback(server: Running) -> None:
    found = listening([server.process.pid, *descendants(server.process.pid)])
    assert ("127.0.0.1", server.port) in found
    assert {host for host, _ in found} == {"127.0.0.1"}


def test_a_server_that_starts_says_not_yet_and_never_not_found(server: Running) -> None:
    assert 503 in server.seen_at_start
    assert server.seen_at_start <= {503, 200}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({**JSON, "Host": "evil.example"}, 421),
        ({**JSON, "x-request-timeout-seconds": "0.0001"}, 200),
        ({**JSON, "x-request-id": "\xff"}, 200),
    ],
)
def test_headers_of_strangers_reach_neither_the_model_nor_ray(
    server: Running, headers: dict[str, str], status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 4})
    connection.request("POST", COMPLETIONS, body, headers)
    assert connection.getresponse().status == status
    connection.close()


@pytest.mark.parametrize("client", ["openai", "anthropic", "lorax"])
def test_the_official_clients_are_served(server: Running, client: str) -> None:
    if not CLIENTS.exists():
        pytest.skip(f"{CLIENTS} is missing: `make test` makes it")
    script = ROOT / "tests" / "clients" / f"{client}_client.py"
    url = f"http://127.0.0.1:{server.port}"
    result = subprocess.run(
        [CLIENTS, script, url, "tiny", "red"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "block", blocks("sh server", "python server"), ids=lambda block: block.name
)
def test_what_the_documents_ask_of_a_server_is_answered(server: Running, block: Block) -> None:
    """As it stands there, but for the address and the adapter's name."""
    text = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace(
        '"sql"', '"red"'
    )
    if block.info.startswith("python"):
        if not CLIENTS.exists():
            pytest.skip(f"{CLIENTS} is missing: `make test` makes it")
        arguments = [str(CLIENTS), "-c", text]
    else:
        arguments = ["bash", "-euo", "pipefail", "-c", text]
    environment = {**os.environ, "REEF_KEY": "none"}
    result = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    shown = ("red", "token_strs")
    assert '"error": {' not in result.stdout, result
    assert any(word in result.stdout for word in shown), result


def test_base_and_adapters_say_different_things(server: Running) -> None:
    def text(model: str) -> str:
        fields = {"prompt": "hello", "temperature": 0, "ignore_eos": True}
        status, answer = server.post(COMPLETIONS, model=model, **fields)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    texts = [text(model) for model in ("tiny", "red", "blue", "red@1", "tiny:blue")]
    assert len(set(texts[:3])) == 3
    assert texts[3:] == texts[1:3]


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        (COMPLETIONS, {"model": "nobody", "prompt": "x"}, 404),
        (COMPLETIONS, {"prompt": ""}, 400),
        (COMPLETIONS, {"prompt": "x", "nonsense": 1}, 400),
        (COMPLETIONS, {"prompt": "x" * (9 << 20)}, 413),
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/nowhere", {}, 404),
        ("/health", {}, 405),
    ],
)
def test_errors_reach_the_client_as_they_are(
    server: Running, path: str, fields: dict[str, Any], status: int
) -> None:
    answered, answer = server.post(path, **fields)
    assert answered == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_hangs_up_frees_its_request_at_once(server: Running) -> None:
    before = server.gauge("reef_generation_tokens_total")
    connection = server.stream(max_tokens=MAX_POSITION - 10)
    connection.getresponse().read(2000)
    wait_for(lambda: server.gauge("reef_requests_running") == 1, 5, "running")
    connection.close()
    wait_for(lambda: server.gauge("reef_requests_running") == 0, 3, "freed")
    assert server.gauge("reef_generation_tokens_total") - before < MAX_POSITION / 2


def test_later_streams_work_like_the_first_ones(server: Running) -> None:
    """Proxies refuse an answer with too many headers: none may be left over from others."""
    for _ in range(120):
        connection = server.stream(max_tokens=1)
        response = connection.getresponse()
        assert response.status == 200 and response.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        assert len(response.getheaders()) < 12


def test_metrics_count_what_was_served(server: Running) -> None:
    before = server.gauge("reef_prompt_tokens_total")
    server.post(COMPLETIONS, model="blue", prompt="abcde", max_tokens=3)
    assert server.gauge("reef_prompt_tokens_total") - before == 5
    assert server.gauge("reef_time_to_first_token_seconds_count") > 0


def test_torch_lives_in_the_engines_process_alone(server: Running) -> None:
    pids = [server.process.pid, *descendants(server.process.pid)]
    with_torch = [pid for pid in pids if "libtorch" in maps(pid)]
    assert with_torch == [server.engine_pid()]


def maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def test_with_one_replica_a_stream_waits_for_its_engine_to_come_back(server: Running) -> None:
    fields = {"model": "red", "max_tokens": 1000, "seed": 1}
    undisturbed = server.stream(**fields)
    wanted = undisturbed.getresponse().read()
    disturbed = server.stream(**fields)
    response = disturbed.getresponse()
    begun = response.read(2000)
    killed = server.engine_pid()
    os.kill(killed, signal.SIGKILL)
    assert text_of(begun + response.read()) == text_of(wanted)
    for connection in (undisturbed, disturbed):
        connection.close()
    assert server.engine_pid() != killed


def text_of(raw: bytes) -> str:
    events = [event.removeprefix("data: ") for event in raw.decode().split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-2])


def test_a_second_server_on_the_same_port_is_refused_with_a_reason(server: Running) -> None:
    config = server.log.with_name("config.yaml")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "reef",
            "serve",
            "--config",
            config,
            "--port",
            str(server.port),
        ],
        cwd=config.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert f"port {server.port}" in result.stderr and "Traceback" not in result.stderr
