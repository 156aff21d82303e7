"""An engine process without a model, which lives and dies as its script says.

    python -m tests.engine.support.scripted_process <socket file descriptor>

`config.source` is a folder: `script.json` there has one word for each start, the last one for all
further starts; each process adds a line to `starts.txt` and another one to `ends.txt` if it ends
by itself. Token ids of a prompt say what its request does; it gives a token every few
milliseconds, as long as the request lives.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

from engine.messages import (
    AbortRequest,
    AddRequest,
    Busy,
    EngineInfo,
    EngineReady,
    EngineStats,
    Ping,
    StartEngine,
    StartFailed,
    StepOutputs,
)
from engine.process import Connection

INFO = EngineInfo(64, 256, 8, 16, (0,), "cpu", "float32", "torch", 1)
HOUR_S = 3600.0

# What a request does, as the first token id of its prompt.
FLOW, SLEEP, SPIN, PAUSE, DIE = range(5)
PAUSE_S = 1.5


def start(word: str, connection: Connection) -> None:
    """Do what the script says of this start."""
    what, _, value = word.partition(":")
    if what == "exit":
        os._exit(int(value))
    elif what == "fail":
        connection.send(StartFailed(value))
        os._exit(1)
    elif what == "fail-and-stay":
        connection.send(StartFailed(value))
        time.sleep(HOUR_S)
    elif what == "hang":
        time.sleep(HOUR_S)
    elif what == "slow":
        for _ in range(round(float(value) / 0.1)):
            connection.send(Busy("weights"))
            time.sleep(0.1)
    elif what == "announce":
        connection.send(Busy("compiling", HOUR_S))
        time.sleep(float(value))
    else:
        assert what == "serve", word


def serve(connection: Connection) -> None:
    (first,) = connection.receive(None)
    assert isinstance(first, StartEngine)
    folder = Path(first.config.source)
    with (folder / "starts.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    words = json.loads((folder / "script.json").read_text())
    number = len((folder / "starts.txt").read_text().split())
    start(words[min(number, len(words)) - 1], connection)
    connection.send(EngineReady(INFO))
    live: list[str] = []
    while not connection.closed:
        is_pinged = False
        for message in connection.receive(0.005 if live else None):
            if isinstance(message, AddRequest):
                live.append(message.request.request_id)
                act(message.request.prompt_token_ids[0])
            elif isinstance(message, AbortRequest):
                live.remove(message.request_id)
            is_pinged |= isinstance(message, Ping)
        if live or is_pinged:
            connection.send(StepOutputs([(r, 0, [1]) for r in live], EngineStats()))
    (folder / "ends.txt").open("a").write(f"{os.getpid()}\n")


def act(what: int) -> None:
    if what == SLEEP:
        time.sleep(HOUR_S)
    elif what == PAUSE:
        time.sleep(PAUSE_S)
    elif what == DIE:
        os._exit(3)
    while what == SPIN:
        pass


if __name__ == "__main__":
    serve(Connection(socket.socket(fileno=int(sys.argv[1]))))
