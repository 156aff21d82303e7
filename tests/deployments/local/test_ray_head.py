"""The Ray head of make serve."""

import tests.deployments.support.quiet_ray  # noqa: F401

# isort: split
import subprocess
import sys
from pathlib import Path

import psutil

from deployments.app import INGRESS_DRAIN_S
from deployments.local.ray_head import _is_running, _kill, ray_environment


def test_two_servers_on_one_machine_share_no_port_folder_or_token(tmp_path: Path) -> None:
    first, second = ray_environment(tmp_path / "a"), ray_environment(tmp_path / "b")
    own = [n for n in first if n.endswith(("_PORT", "_LOC", "_PATH", "_BASE", "_FILE", "_TOKEN"))]
    assert len(own) == 9
    assert all(first[name] != second[name] for name in own)


def test_ray_ends_nothing_for_memory_and_cuts_no_answer_of_a_stopped_ingress() -> None:
    environment = ray_environment(Path("folder"))
    assert environment["RAY_memory_monitor_refresh_ms"] == "0"
    assert float(environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > INGRESS_DRAIN_S


A_PARENT_THAT_DOES_NOT_CARE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_all_processes_below_are_ended() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", A_PARENT_THAT_DOES_NOT_CARE], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        family = psutil.Process().children(recursive=True)
        ours = [process for process in family if process.pid in (parent.pid, child)]
        assert [process.pid for process in ours] == [parent.pid, child], "parents come first"
        _kill(ours)
        assert not any(map(_is_running, ours))
        _kill(ours)  # what is gone already is no error


def test_a_zombie_is_not_running() -> None:
    ended = subprocess.Popen([sys.executable, "-c", "print()"], stdout=subprocess.PIPE)
    assert ended.stdout is not None
    ended.stdout.read()
    process = psutil.Process(ended.pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        pass
    assert not _is_running(process)
    ended.communicate()
