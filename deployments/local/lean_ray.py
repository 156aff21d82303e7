"""Start Ray's head without what a machine by itself has no use for.

Left out are dashboard, autoscaler, log monitor and both agents, which import most of Ray, and
workers are forked instead of started (`worker_forks`). Together they take half of the CPU of a
start. Ray has no options for it: `lean_ray` replaces the functions that start them.
"""

# Ray's own types are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

import os
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from deployments.local import worker_forks
from deployments.local.ray_worker import SETUP_VARIABLE, SOCKET_VARIABLE

HERE = Path(__file__).parent
JOB_VARIABLE, NO_JOB = "RAY_JOB_ID", "ffffffff"
RAYLET_VARIABLE = "RAY_RAYLET_PID"
# What Ray's workers import here, all of them or some.
PRELOADED = (
    "ray.serve._private.controller",
    "ray.serve._private.haproxy",
    "ray.serve._private.proxy",
    "ray.serve._private.replica",
    "uvloop",
    "deployments.app",
)
# option of the raylet, and the ports that it waits for
AGENTS = {
    "--dashboard_agent_command": (
        "metrics_agent_port",
        "metrics_export_port",
        "dashboard_agent_listen_port",
    ),
    "--runtime_env_agent_command": ("runtime_env_agent_port",),
}


def start_forks(folder: Path) -> None:
    """Import what workers need, and start the process that they are forked from."""
    # Ray's library reads these when it is loaded, which forks do no more. A worker without a job
    # takes that of its first task; one whose raylet has ended ends, too.
    os.environ.update({JOB_VARIABLE: NO_JOB, RAYLET_VARIABLE: str(os.getpid())})
    preload()
    for variable in (JOB_VARIABLE, RAYLET_VARIABLE):
        del os.environ[variable]
    path = folder / "forks.sock"
    worker_forks.start(path)
    os.environ[SOCKET_VARIABLE] = str(path)


def preload() -> None:
    """Import what workers need, and leave the generator of Ray's ids as it is.

    Each class of Ray Serve's draws an id when it is imported. From the first one on, all forks
    would draw the same ids as each other: two workers that start at once then store the same
    object, one of them dies of it, and `ray.init` never returns.
    """
    from ray import actor

    with _replaced(actor, "ActorClassID", _ActorClassID):
        for name in PRELOADED:
            import_module(name)


class _ActorClassID:
    @staticmethod
    def from_random() -> Any:
        from ray import ActorClassID

        return ActorClassID(os.urandom(ActorClassID.size()))


@contextmanager
def lean_ray() -> Generator[None]:
    """Have `ray.init` start as little as possible within the block."""
    from ray._private import node, services

    start = services.start_ray_process

    class Node(node.Node):
        def __init__(self, ray_params: Any, **options: Any) -> None:
            ray_setup = Path(node.__file__).parent / "workers" / "setup_worker.py"
            os.environ[SETUP_VARIABLE] = str(ray_setup)
            ray_params.update(
                no_monitor=True,
                include_log_monitor=False,
                setup_worker_path=str(HERE / "ray_worker.py"),
            )
            super().__init__(ray_params, **options)

        def start_api_server(self, **_: Any) -> None:
            self._webui_url = ""

    def start_with_idle_agents(command: list[str], *args: Any, **options: Any) -> Any:
        return start([with_idle_agent(word, command) for word in command], *args, **options)

    with (
        _replaced(node, "Node", Node),
        _replaced(services, "start_ray_process", start_with_idle_agents),
    ):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Generator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def with_idle_agent(word: str, command: Sequence[str]) -> str:
    """Replace an agent's command in the raylet's."""
    option, _, _ = word.partition("=")
    names = AGENTS.get(option)
    if names is None:
        return word
    folder, node_id = _value(command, "--session_dir"), _value(command, "--node_id")
    script = str(HERE / "idle_agent.py")
    agent = [sys.executable, "-I", "-S", script, folder, node_id, *names]
    return f"{option}={subprocess.list2cmdline(agent)}"


def _value(command: Sequence[str], option: str) -> str:
    return next(word.partition("=")[2] for word in command if word.startswith(f"{option}="))
