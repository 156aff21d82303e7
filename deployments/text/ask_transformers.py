"""Ask transformers for a folder's tokenizer, in a process of its own that ends with the answer.

So the process that serves imports neither transformers nor what that imports.

    python -m deployments.text.ask_transformers <folder>
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = (sys.executable, "-m", "deployments.text.ask_transformers")
LEAST_VERSION = 5
TIMEOUT_S = 300.0
_OURS = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUTF8": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class TransformersFailed(ValueError):
    """transformers has not built the tokenizer; the message says why."""


def ask_transformers(folder: Path) -> str:
    """Return AutoTokenizer's tokenizer, written as a tokenizer.json. Raises TransformersFailed."""
    if importlib.util.find_spec("transformers") is None:
        raise TransformersFailed(
            "models[].tokenizer: transformers needs the package transformers, version "
            f"{LEAST_VERSION} or newer, which is not installed"
        )
    try:
        answer = subprocess.run(
            [*PROGRAM, str(folder)],
            env={**os.environ, **_OURS},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise TransformersFailed(
            f"transformers did not load {folder} in {TIMEOUT_S:.0f} s"
        ) from None
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[-1]
        raise TransformersFailed(f"transformers cannot load the tokenizer of {folder}: {reason}")
    return answer.stdout


def build(folder: str) -> str:
    transformers: Any = importlib.import_module("transformers")  # takes seconds

    if int(transformers.__version__.split(".")[0]) < LEAST_VERSION:
        sys.exit(f"it is version {transformers.__version__}, older than {LEAST_VERSION}")
    auto_tokenizer = transformers.AutoTokenizer
    tokenizer = auto_tokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer.backend_tokenizer.to_str()


if __name__ == "__main__":
    sys.stdout.write(build(sys.argv[1]))
