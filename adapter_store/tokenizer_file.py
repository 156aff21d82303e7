"""TokenizerFile: what a tokenizer.json holds, found by a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 64 * 2**20  # Gemma's, with 262,144 tokens, has 33 MB
PROGRAM = (sys.executable, "-m", "adapter_store.tokenizer_process")
TIMEOUT_S = 120.0
KEPT = 16
# A process that reads strangers' files gets no credentials.
_PASSED_ON = ("LD_LIBRARY_PATH", "PATH", "TZ")

Step = Mapping[str, Any]

_known: "dict[str, TokenizerFile]" = {}  # by the hash of the content, the latest used at the end


class TokenizerRefused(ValueError):
    """The file cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """`model_sha256` is of the vocabulary, the merges and their options, however they are written.

    Each added token has `id`, `content` and the library's flags; `steps` are the normalizer,
    pre_tokenizer, post_processor and decoder, each as the library writes it, or None.
    """

    model_sha256: str
    added_tokens: Sequence[Mapping[str, Any]]
    steps: Mapping[str, Step | None]


def read_tokenizer_file(path: Path) -> TokenizerFile:
    """Inspect a tokenizer.json; the last KEPT contents are known. Raises TokenizerRefused, OSError.

    Takes about a second of a processor and, for a moment, the memory of the file.
    """
    num_bytes = path.stat().st_size
    if num_bytes > MAX_FILE_BYTES:
        raise TokenizerRefused(f"it has {num_bytes} bytes, and at most {MAX_FILE_BYTES} are taken")
    raw = path.read_bytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    found = _known.pop(sha256, None) or _inspect(raw)
    _known[sha256] = found
    for old in list(_known)[:-KEPT]:
        _known.pop(old, None)
    return found


def _inspect(raw: bytes) -> TokenizerFile:
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    try:
        done = subprocess.run(
            PROGRAM,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            input=raw,
            capture_output=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise TokenizerRefused(f"it could not be read in {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0 or not done.stdout:
        raise TokenizerRefused("reading it takes too much time or memory")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "refused" in answer:
        raise TokenizerRefused(answer["refused"])
    model_sha256, added = answer.pop("model_sha256"), answer.pop("added_tokens")
    return TokenizerFile(model_sha256, added, answer)
