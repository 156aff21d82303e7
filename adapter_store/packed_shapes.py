"""Read the shapes of quantized modules, which those of their tensors do not show."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_store.safetensors_file import TensorEntry

Tensors = Mapping[str, tuple[Path, TensorEntry]]
_WORD_CODES = 8  # codes of 4 bits in a word of GPTQ and AWQ
_QUANT_STATE = re.compile(r"(?P<module>.+)\.weight\.quant_state\.bitsandbytes__\w+")
_PACKED = re.compile(r"(?P<module>.+)\.qweight")
_MAX_STATE_BYTES = 4096


def packed_shapes(tensors: Tensors) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of all modules that are stored in 4 bits.

    Raises OSError, ValueError.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, (path, entry) in tensors.items():
        if match := _QUANT_STATE.fullmatch(name):
            shapes[match["module"]] = _of_state(name, path, entry)
        elif match := _PACKED.fullmatch(name):
            shapes[match["module"]] = _of_words(match["module"], entry, tensors)
    return shapes


def _of_state(name: str, path: Path, entry: TensorEntry) -> tuple[int, int]:
    """Read bitsandbytes' JSON, which is stored as a tensor of bytes."""
    num_bytes = entry.end - entry.start
    if num_bytes > _MAX_STATE_BYTES:
        raise ValueError(f"{name} has {num_bytes} bytes, and {_MAX_STATE_BYTES} are allowed")
    with path.open("rb") as file:
        raw = os.pread(file.fileno(), num_bytes, entry.start)
    try:
        state: dict[str, Any] = json.loads(raw)
        out_features, in_features = (int(size) for size in state["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} has no shape of two sizes: {error!r}") from error
    return out_features, in_features


def _of_words(module: str, entry: TensorEntry, tensors: Tensors) -> tuple[int, int]:
    """GPTQ packs inputs and AWQ outputs; the scales [groups, out] tell the outputs of both."""
    scales = tensors.get(f"{module}.scales")
    shape = () if scales is None else scales[1].shape
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"{module} has a qweight, but no scales of [groups, out_features]")
    return shape[1], _WORD_CODES * entry.num_elements // shape[1]
