"""Starts and ends a server for a benchmark, with its own configuration and store."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from adapter_store.store import AdapterStore
from tests.bench.environment import ROOT

MODEL = "bench"
TENANT = "public"
SERVE = f"{sys.executable} -m reef serve --config {{config}} --port {{port}}"
MIB = 2**20
START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 60.0
GROUPS = ("engine", "replica", "ingress", "haproxy", "ray")


def engine_settings(max_num_seqs: int, memory_mib: int) -> dict[str, Any]:
    """Return the settings of an engine that is measured."""
    return {
        "device": "auto",
        "max_num_seqs": max_num_seqs,
        "max_model_len": 2048,
        "memory_bytes": memory_mib * MIB,
        "enable_prefix_caching": False,  # rounds repeat their prompts
        "num_threads": torch.get_num_threads(),
    }


def write_config(
    scratch: Path,
    source: Path,
    engine: dict[str, Any],
    replicas: int = 1,
    root: str | None = None,
) -> Path:
    """Write the configuration, as JSON, which is valid YAML. `root`: of another store."""
    model = {"id": MODEL, "source": str(source), "engine": engine, "replicas": {"min": replicas}}
    args = {
        "models": [model],
        "adapters": {
            "root": root or f"file://{scratch / 'store'}",
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
    """Publish the adapters; return their model names for requests."""
    store = AdapterStore(f"file://{scratch / 'store'}", scratch / "disk", 10 * 2**30)
    base = store.register_base(source)
    return [store.publish(folder, TENANT, folder.name, base).name for folder in folders]


@contextmanager
def serving(config: Path, checkout: Path = ROOT, command: str = SERVE) -> Iterator[tuple[str, int]]:
    """Yield (address, process id) of a server that has answered /health; end it with the block.

    `command` runs in `checkout`, with {config} and {port} filled in and without a shell.
    """
    port = _free_port()
    words = [word.format(config=config, port=port) for word in shlex.split(command)]
    process = subprocess.Popen(words, cwd=checkout, stdout=sys.stderr)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process)
        yield url, process.pid
    finally:
        _end(process)


def command_of_make(checkout: Path) -> str:
    """Return the last command of the checkout's `make serve`, for `serving`."""
    dry_run = ["make", "--dry-run", "--no-print-directory", "serve"]
    recipe = subprocess.run(
        [*dry_run, "CONFIG={config}", "PORT={port}"],
        cwd=checkout,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return recipe.splitlines()[-1].removeprefix("exec ")


def _wait_until_healthy(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    raise RuntimeError(f"the server was not healthy after {START_TIMEOUT_S:.0f} s")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Interrupt the server; kill its remaining processes, by recorded pid and start time."""
    recorded = {pid: _started(pid) for pid in groups_of_processes(process.pid)}
    process.send_signal(signal.SIGINT)
    try:
        process.wait(END_TIMEOUT_S)
    finally:
        left = [pid for pid, started in recorded.items() if started and _started(pid) == started]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ==== its processes ====


def groups_of_processes(root: int) -> dict[int, str]:
    """Map every process at and below `root` to its group in GROUPS."""
    parents = dict(_parents())
    return {pid: _group(pid) for pid in parents if _is_below(pid, root, parents)}


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # it has ended in the meantime
            yield int(entry.name), int(stat.rpartition(")")[2].split()[1])


def _started(pid: int) -> str | None:
    """Return when the process began, in ticks since boot; None if it has ended or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _is_below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid not in (0, root):
        pid = parents.get(pid, 0)
    return pid == root


def _group(pid: int) -> str:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        title = ""
    if "engine.process" in title or "engine.grammar.process" in title:
        return "engine"
    if title.startswith("ray::ServeReplica:"):
        return "ingress" if ":Ingress" in title else "replica"
    return "haproxy" if "/haproxy " in title else "ray"
