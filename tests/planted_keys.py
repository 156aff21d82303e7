"""Finds the tests' API keys: all are `reef-` and one letter forty times, so any can be told."""

import re
import subprocess
from pathlib import Path

_KEY = re.compile(r"reef-([a-z])\1{39}")
_LETTERS = "|".join(f"{letter}{{40}}" for letter in "abcdefghijklmnopqrstuvwxyz")
LOGS = ("*.log", "*.out", "*.err")


def holds_key(text: str) -> bool:
    return "reef-" in text and _KEY.search(text) is not None


def logs_with_keys(folder: Path) -> list[str]:
    """List the logs below a folder that hold a key."""
    includes = [f"--include={pattern}" for pattern in LOGS]
    command = ["grep", "-rlaE", *includes, f"reef-({_LETTERS})", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
