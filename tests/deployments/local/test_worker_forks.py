"""Ray's workers, forked from one process, are as good as started by themselves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.local import idle_agent, ray_worker
from deployments.local.ray_worker import CONTEXT, LANGUAGE, SETUP_VARIABLE, SOCKET_VARIABLE

ROOT = Path(__file__).parents[3]
REPORT = """
import json, os, signal, sys
state = {
    "argv": sys.argv, "pid": os.getpid(), "parent": os.getppid(), "folder": os.getcwd(),
    "colour": os.environ.get("COLOUR"), "only_of_server": "ONLY_OF_SERVER" in os.environ,
    "group": os.getpgrp(), "has_module": "colorsys" in sys.modules, "name": __name__,
    "is_blocked": signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()),
}
print(json.dumps(state), flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Yields its socket and its process."""
    path = tmp_path_factory.mktemp("forks") / "s"
    environment = {**os.environ, "ONLY_OF_SERVER": "1"}
    process = subprocess.Popen(start_program(path, "time.sleep(60)"), cwd=ROOT, env=environment)
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield str(path), process.pid
    process.kill()
    process.wait()


def start_program(path: Path, then: str) -> list[str]:
    code = (
        "import colorsys, time; from pathlib import Path; "
        "from deployments.local import worker_forks; "
        f"print(worker_forks.start(Path({str(path)!r})), flush=True); {then}"
    )
    return [sys.executable, "-c", code]


def run_worker(socket: str, folder: Path, *words: str, context: str = "{}") -> str:
    script = folder / "report.py"
    script.write_text(REPORT)
    output = folder / "output"
    command = [sys.executable, ray_worker.__file__, str(script), *words]
    environment = {**os.environ, SOCKET_VARIABLE: socket, "COLOUR": "a=b", SETUP_VARIABLE: "none"}
    with output.open("wb") as file:
        subprocess.run(
            [*command, LANGUAGE, CONTEXT + context],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
            timeout=30,
            check=False,
        )
    deadline_s = time.monotonic() + 10
    while not output.read_text().endswith("\n") and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return output.read_text()


def test_a_worker_is_a_fork_with_its_own_environment_folder_and_output(
    server: tuple[str, int], tmp_path: Path
) -> None:
    state = json.loads(run_worker(server[0], tmp_path, "--one", "two words"))
    assert state["argv"][1:] == ["--one", "two words"] and state["name"] == "__main__"
    assert state["has_module"] and Path(f"/proc/{state['parent']}/stat").exists()
    assert Path(f"/proc/{state['parent']}/stat").read_text().split()[3] == str(server[1])
    assert state["folder"] == str(tmp_path) and state["colour"] == "a=b"
    assert not state["only_of_server"] and state["is_blocked"]
    assert state["group"] == state["pid"]


def test_a_worker_that_finds_no_server_is_a_process_of_its_own(tmp_path: Path) -> None:
    state = json.loads(run_worker(str(tmp_path / "nothing"), tmp_path))
    assert not state["has_module"] and state["colour"] == "a=b"


def test_a_worker_with_a_runtime_environment_is_left_to_rays_own_script(
    server: tuple[str, int], tmp_path: Path
) -> None:
    output = run_worker(server[0], tmp_path, context='{"env_vars": {"A": "1"}}')
    assert "can't open file" in output and "none" in output


def test_the_server_of_forks_ends_with_its_parent(tmp_path: Path) -> None:
    command = start_program(tmp_path / "s", "pass")
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert_ends(int(ended.stdout))


def test_forks_draw_ids_of_their_own() -> None:
    code = (
        "import os; from deployments.local.lean_ray import preload; preload(); import ray\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        print(ray.ObjectRef.from_random().hex(), flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert len(set(ended.stdout.split())) == 3


def test_an_idle_agent_says_that_it_has_no_ports_and_ends_with_the_raylet(tmp_path: Path) -> None:
    words = [sys.executable, "-I", "-S", idle_agent.__file__, str(tmp_path), "node", "one", "two"]
    last = tmp_path / "two_node"
    start = (
        "import os, subprocess, time; "
        f"p = subprocess.Popen({words!r}); "
        f"[time.sleep(0.01) for _ in range(1000) if not os.path.exists({str(last)!r})]; "
        "print(p.pid, flush=True)"
    )
    ended = subprocess.run([sys.executable, "-c", start], capture_output=True, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one_node", "two_node"]
    assert last.read_text() == "-1"
    assert_ends(int(ended.stdout))


def assert_ends(pid: int) -> None:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("it has not ended")
