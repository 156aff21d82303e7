"""Read single tensors of safetensors files as arrays, and know which file holds which."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapter_store.errors import AdapterInvalid
from adapter_store.safetensors_file import HeaderLimits, TensorEntry, read_header

Matrix = npt.NDArray[np.float32]
_VIEWS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The tensors of one or more files by name."""

    entries: Mapping[str, tuple[Path, TensorEntry]]

    def raw(self, name: str) -> tuple[str, npt.NDArray[Any]]:
        """Return a tensor's dtype and its numbers bit by bit; bfloat16 as unsigned integers."""
        path, entry = self.entries[name]
        if entry.dtype not in _VIEWS:
            raise AdapterInvalid(
                f"tensor {name} has dtype {entry.dtype}, not one of {', '.join(_VIEWS)}"
            )
        with path.open("rb") as file:
            data = os.pread(file.fileno(), entry.end - entry.start, entry.start)
        return entry.dtype, np.frombuffer(data, _VIEWS[entry.dtype]).reshape(entry.shape)

    def read(self, name: str) -> Matrix:
        """Return a tensor in float32. Raises AdapterInvalid if it is not finite."""
        dtype, data = self.raw(name)
        if dtype == "BF16":  # the upper half of a float32
            result = (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            result = data.astype(np.float32)
        if not np.isfinite(result).all():
            raise AdapterInvalid(f"tensor {name} holds a NaN or an infinity")
        return result


def open_tensors(paths: Sequence[Path], limits: HeaderLimits | None = None) -> TensorFile:
    """Read the headers of files. Raises AdapterInvalid."""
    entries: dict[str, tuple[Path, TensorEntry]] = {}
    for path in paths:
        try:
            header = read_header(path, limits)
        except (OSError, ValueError) as error:
            raise AdapterInvalid(f"{path} is not a valid safetensors file: {error}") from error
        entries |= {name: (path, entry) for name, entry in header.items()}
    return TensorFile(entries)
