"""Stands in for an agent of Ray's that a machine by itself has no use for, until the raylet ends.

    python idle_agent.py <session folder> <node id> <name of a port> ...

The raylet insists on having its agents, and on knowing their ports. "-1" says that there is none,
as Ray's own agent does where Ray is installed without its extras. Standard library alone.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def main() -> None:
    folder, node_id, *names = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in names:
        path = Path(folder) / f"{name}_{node_id}"
        part = path.with_name(f"{path.name}.part")
        part.write_text("-1")
        os.replace(part, path)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
