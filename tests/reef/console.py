"""The console script as a shell starts it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sys.executable).with_name("reef")


def reef(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run it on the packages of this checkout, wherever the script was installed from."""
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
