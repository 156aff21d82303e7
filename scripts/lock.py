"""Writes requirements.lock: the version of every package of the development environment.

    python scripts/lock.py            what `make lock` runs

pip resolves `.[dev]` afresh, as if nothing were installed. Run it with the oldest Python that is
supported, so that the lock fits the newer ones too, and where torch comes without CUDA.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
OURS = "reef"
HEADER = """\
# Every package of the development environment on a CPU, direct and transitive.
#
# `make` installs with these constraints: pip install -c requirements.lock -e '.[dev]'
# Made by `make lock` from pyproject.toml; never edit it by hand.
#
# Not for machines with a GPU: no CUDA package is named here, since torch's CUDA build pins its
# own. There, and in the image, install without it.
"""


def main() -> int:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    result = subprocess.run(
        [*command, "--quiet", "--report", "-", "--editable", ".[dev]"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    versions = read_versions(json.loads(result.stdout))
    if cuda := [name for name in versions if name.startswith(("nvidia-", "cuda-"))]:
        print(f"torch brings {', '.join(cuda)} here: take its CPU build", file=sys.stderr)
        return 1
    pins = [f"{name}=={version}\n" for name, version in sorted(versions.items())]
    LOCK.write_text(HEADER + "".join(pins))
    return 0


def read_versions(report: Mapping[str, Any]) -> dict[str, str]:
    """Versions by normalized name, without the project itself and without local parts (`+cpu`)."""
    found: dict[str, str] = {}
    for entry in report["install"]:
        metadata = entry["metadata"]
        name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
        if name != OURS:
            found[name] = metadata["version"].partition("+")[0]
    return found


if __name__ == "__main__":
    sys.exit(main())
