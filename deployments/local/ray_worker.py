"""What the raylet runs for a worker: has `worker_forks` fork it, and ends.

Ray's own script for this imports Ray only to start another interpreter, which imports it again.
A worker whose runtime environment asks for more is left to that script. Standard library alone.
"""

import os
import runpy
import socket
import sys
from contextlib import suppress

SOCKET_VARIABLE = "REEF_WORKER_FORKS"
SETUP_VARIABLE = "REEF_RAYS_SETUP_WORKER"
LANGUAGE = "--language=PYTHON"
CONTEXT = "--serialized-runtime-env-context="
PLAIN_CONTEXTS = ("", "{}")
ANSWER = b"forked"


def main() -> None:
    words = [word for word in sys.argv[1:] if word != LANGUAGE and not word.startswith(CONTEXT)]
    contexts = [word.removeprefix(CONTEXT) for word in sys.argv if word.startswith(CONTEXT)]
    if LANGUAGE not in sys.argv or not set(contexts) <= set(PLAIN_CONTEXTS):
        setup = os.environ[SETUP_VARIABLE]
        os.execv(sys.executable, [sys.executable, setup, *sys.argv[1:]])
    with suppress(OSError):  # the server is gone: the worker is this process
        if fork_elsewhere(words):
            return
    run_worker(words)


def fork_elsewhere(words: list[str]) -> bool:
    """Have the server fork a process with our environment, folder and output."""
    strings = [*words, "", os.getcwd(), *(f"{key}={value}" for key, value in os.environ.items())]
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[SOCKET_VARIABLE])
        body = "\0".join(strings).encode(errors="surrogateescape")
        header = len(body).to_bytes(4, "little")
        socket.send_fds(server, [header], [sys.stdout.fileno(), sys.stderr.fileno()])
        server.sendall(body)
        return server.recv(len(ANSWER)) == ANSWER


def run_worker(words: list[str]) -> None:
    """Be the worker: a path of a script, and its arguments."""
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
