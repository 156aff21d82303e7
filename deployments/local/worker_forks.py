"""Forks Ray's workers from one process that has imported what they need.

Each worker would import Ray Serve and our deployments by itself, a second of CPU and a hundred
megabytes, and there are five. Forks share both with each other and with the process of
`reef serve`, from which theirs is forked. That one must not have used Ray yet, so that a fork is as
good as a process of its own.
"""

import atexit
import ctypes
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

from deployments.local.ray_worker import ANSWER, run_worker

PR_SET_PDEATHSIG = 1
_HEADER = 4
_NUM_FDS = 2


def start(path: Path) -> int:
    """Fork the process that forks on request, by the socket `path`; return its id.

    It ends when this one does.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        gc.collect()
        gc.freeze()  # a collection would write to what is shared
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _exit_after(lambda: _serve(listener, parent))
    gc.unfreeze()
    return pid


def _exit_after(work: Callable[[], None]) -> NoReturn:
    """Do all that a forked process is for: what called `start` must not go on in it."""
    status: Any = 0
    try:
        work()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        cast(Any, atexit)._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _serve(listener: socket.socket, parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as Ray does in its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    while True:
        connection, _ = listener.accept()
        with connection:
            strings, fds = _read_request(connection)
            if os.fork() == 0:
                listener.close()
                connection.close()
                _exit_after(partial(_work, strings, fds))
            connection.sendall(ANSWER)
            for fd in fds:
                os.close(fd)


def _read_request(connection: socket.socket) -> tuple[list[str], list[int]]:
    header, fds, _, _ = socket.recv_fds(connection, _HEADER, _NUM_FDS)
    size = int.from_bytes(header, "little")
    with connection.makefile("rb") as file:
        return file.read(size).decode(errors="surrogateescape").split("\0"), fds


def _work(strings: list[str], fds: list[int]) -> None:
    """Become what the raylet has started, with its environment, folder and output."""
    end = strings.index("")
    words, (folder, *variables) = strings[:end], strings[end + 1 :]
    os.setpgid(0, 0)  # the raylet ends a worker's whole group when the worker has ended
    os.environ.clear()
    for variable in variables:
        name, _, value = variable.partition("=")
        os.environ[name] = value
    os.chdir(folder)
    for fd, target in zip(fds, (1, 2), strict=True):
        os.dup2(fd, target)
        os.close(fd)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    run_worker(words)
