"""Starts a real server, watches its processes, and checks that nothing of it is left behind."""

import http.client
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from adapter_store.file_lock import FileLock
from deployments.local.ray_head import free_port
from tests.bench.environment import ROOT
from tests.bench.server import groups_of_processes
from tests.deployments.support.processes import command, listening

START_TIMEOUT_S = 180.0
END_TIMEOUT_S = 60.0
GONE_TIMEOUT_S = 15.0
MIB = 2**20
# A file system of a given size at one folder, for one process and those that it starts.
WITH_SMALL_DISK = 'mount -t tmpfs -o size="$1" small "$2" && shift 2 && exec "$@"'
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", WITH_SMALL_DISK, "sh"]
IDLE_GAUGES = (
    "reef_requests_running",
    "reef_requests_waiting",
    "reef_requests_open",
    "reef_requests_held",
    "reef_queued_tokens",
    "reef_kv_blocks_used",
)


@dataclass
class Server:
    """One `reef serve`. `seen` has all of its processes that `look` has found, ended ones too."""

    process: "subprocess.Popen[bytes]"
    port: int
    disk_path: Path  # as the server sees it
    log: Path
    seen: dict[psutil.Process, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # ---- processes -----------------------------------------------------------------------

    def look(self) -> dict[str, list[int]]:
        """Find the processes by group, and remember them.

        Groups are those of the benchmarks, and what is beside an engine for grammars.
        """
        groups: dict[str, list[int]] = {}
        for pid, group in sorted(groups_of_processes(self.process.pid).items()):
            if "engine.grammar" in command(pid):
                group = "grammar"
            groups.setdefault(group, []).append(pid)
            with suppress(psutil.NoSuchProcess):
                self.seen[psutil.Process(pid)] = group
        return groups

    def rss_mib(self) -> dict[str, float]:
        """The largest resident memory of a process of each group, in MiB."""
        most: dict[str, float] = {}
        for group, pids in self.look().items():
            for pid in pids:
                with suppress(psutil.NoSuchProcess):
                    found = psutil.Process(pid).memory_info().rss / MIB
                    most[group] = max(most.get(group, 0.0), found)
        return most

    def strays(self) -> list[str]:
        """Processes that live although the one that started them has ended."""
        known = {pid for pids in self.look().values() for pid in pids}
        return [f"{group} {p.pid}" for p, group in self.seen.items() if _lives(p, known)]

    # ---- figures -------------------------------------------------------------------------

    def scrapes(self) -> list[dict[str, float]]:
        """What each ingress reports: sums over labels, by series."""
        ports = {port for _, port in listening(self.look().get("ingress", []))}
        texts = [text for port in sorted(ports) if (text := _scrape(port)) is not None]
        return [_sums(text) for text in texts]

    def leftovers(self) -> list[str]:
        """What an idle server must not have: requests, KV blocks, pinned adapters, strays."""
        found = [
            f"{name} is {scrape[name]:.0f}"
            for scrape in self.scrapes()
            for name in IDLE_GAUGES
            if scrape[name]
        ]
        return found + [f"{digest} is pinned" for digest in self.pinned()] + self.strays()

    def wait_until_idle(self, seconds: float) -> list[str]:
        """Wait until nothing is left over. Returns what still is at the end."""
        deadline_s = time.monotonic() + seconds
        while (left := self.leftovers()) and time.monotonic() < deadline_s:
            time.sleep(0.5)
        return left

    # ---- the disk cache --------------------------------------------------------------------

    @property
    def disk(self) -> Path:
        """The folder of the disk cache, as it is seen from here."""
        return Path(f"/proc/{self.process.pid}/root{self.disk_path}")

    def pinned(self) -> list[str]:
        """Digests whose lock some process holds."""
        held: list[str] = []
        for path in self.disk.glob(".locks/*.pin"):
            lock = FileLock.acquire(path, wait=False)
            if lock is None:
                held.append(path.stem[:12])
            else:
                lock.release()
        return held


def _lives(process: psutil.Process, known: set[int]) -> bool:
    try:
        is_running = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return is_running and process.pid not in known
    except psutil.NoSuchProcess:
        return False


def _scrape(port: int) -> str | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except (OSError, ValueError, http.client.HTTPException):
        return None  # another port of the process
    return text if "reef_requests_running" in text else None


def _sums(text: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


# ==== start and end ====


def can_have_small_disk() -> bool:
    """Whether this machine lets a process have a file system of its own."""
    probe = subprocess.run([*UNSHARE, "64k", "/mnt", "true"], capture_output=True, check=False)
    return probe.returncode == 0


@contextmanager
def running(
    config: Path,
    disk_path: Path,
    log: Path,
    small_disk_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Yield a server that is healthy; end it with the block. Raises RuntimeError for leftovers."""
    disk_path.mkdir(parents=True, exist_ok=True)
    port = free_port()
    serve = [sys.executable, "-m", "reef", "serve", "--config", str(config)]
    serve += ["--port", str(port)]
    if small_disk_bytes is not None:
        serve = [*UNSHARE, str(small_disk_bytes), str(disk_path), *serve]
    with log.open("wb") as output:
        process = subprocess.Popen(
            serve,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, port, disk_path, log)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        left = _end(server)
    if left:
        raise RuntimeError(f"processes were left behind: {left}")


def _wait_until_healthy(server: Server) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{server.log.read_text()[-3000:]}")
        with suppress(OSError):
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"not healthy:\n{server.log.read_text()[-3000:]}")


def _end(server: Server) -> list[str]:
    """Interrupt the server and wait for its processes. Kills, and returns, those that stay."""
    server.look()
    server.process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        server.process.wait(END_TIMEOUT_S)
    _, alive = psutil.wait_procs(list(server.seen), GONE_TIMEOUT_S)
    left = [p for p in alive if _lives(p, set())]
    names = [f"{server.seen[p]} {p.pid}" for p in left]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait()
    return names
