"""A server of our own for a benchmark: its configuration, its store, its life, its processes."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapter_store.store import AdapterStore
from tests.bench.environment import ROOT

MODEL = "bench"
TENANT = "public"
START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 60.0
GROUPS = ("engine", "replica", "ingress", "haproxy", "ray")


def write_config(scratch: Path, source: Path, engine: dict[str, Any], replicas: int = 1) -> Path:
    """JSON is YAML too."""
    model = {"id": MODEL, "source": str(source), "engine": engine, "replicas": {"min": replicas}}
    args = {
        "models": [model],
        "adapters": {
            "root": f"file://{scratch / 'store'}",
            "disk_path": str(scratch / "disk"),
        },
    }
    application = {
        "name": "reef",
        "import_path": "deployments.app:build_app",
        "route_prefix": "/",
        "args": args,
    }
    path = scratch / "bench.yaml"
    path.write_text(json.dumps({"applications": [application]}), encoding="utf-8")
    return path


def publish(scratch: Path, source: Path, folders: Sequence[Path]) -> list[str]:
    """The adapters' names as a client says them."""
    store = AdapterStore(f"file://{scratch / 'store'}", scratch / "disk", 10 * 2**30)
    base = store.register_base(source)
    return [store.publish(folder, TENANT, folder.name, base).name for folder in folders]


@contextmanager
def serving(config: Path) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server that has answered /health; ended with the block."""
    port = _free_port()
    command = [sys.executable, "-m", "deployments.local.serve", "--config", str(config)]
    process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stdout=sys.stderr)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(END_TIMEOUT_S)


def _wait_until_healthy(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"the server was not healthy after {START_TIMEOUT_S:.0f} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ==== its processes ====


def groups_of_processes(root: int) -> dict[int, str]:
    """Every process at and below `root`, and which of GROUPS it belongs to."""
    parents = dict(_parents())
    return {pid: _group(pid) for pid in parents if _is_below(pid, root, parents)}


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # it has ended meanwhile
            yield int(entry.name), int(stat.rpartition(")")[2].split()[1])


def _is_below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid not in (0, root):
        pid = parents.get(pid, 0)
    return pid == root


def _group(pid: int) -> str:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        title = ""
    if "engine.process" in title:
        return "engine"
    if title.startswith("ray::ServeReplica:"):
        return "ingress" if ":Ingress" in title else "replica"
    return "haproxy" if "/haproxy " in title else "ray"
