"""Read single tensors of safetensors files as arrays, and know which file holds which."""

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
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80}  # without its sign; what is above is no number
_CACHED = 2**18  # numbers that are widened at a time, within a core's cache
_CODES = {"U8": "u1", "I8": "i1", "I32": "<i4"}


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The tensors of one or more files by name."""

    entries: Mapping[str, tuple[Path, TensorEntry]]

    def raw(self, name: str, rows: slice | None = None) -> tuple[str, npt.NDArray[Any]]:
        """Return a tensor's dtype and its numbers bit by bit; bfloat16 as unsigned integers."""
        entry = self.entries[name][1]
        if entry.dtype not in _VIEWS:
            raise AdapterInvalid(
                f"tensor {name} has dtype {entry.dtype}, not one of {', '.join(_VIEWS)}"
            )
        return entry.dtype, self._load(name, _VIEWS[entry.dtype], rows)

    def codes(self, name: str, dtype: str) -> npt.NDArray[Any]:
        """Return a tensor of whole numbers. Raises ValueError if its dtype is another."""
        found = self.entries[name][1].dtype
        if found != dtype:
            raise ValueError(f"tensor {name} has dtype {found}, not {dtype}")
        return self._load(name, _CODES[dtype])

    def _load(self, name: str, view: str, rows: slice | None = None) -> npt.NDArray[Any]:
        path, entry = self.entries[name]
        start, end, shape = entry.start, entry.end, entry.shape
        if rows is not None:
            row_bytes = (end - start) // shape[0]
            start, end = start + rows.start * row_bytes, start + rows.stop * row_bytes
            shape = (rows.stop - rows.start, *shape[1:])
        with path.open("rb") as file:
            data = np.empty(end - start, np.uint8)  # not cleared, as a bytearray is
            file.seek(start)
            if file.readinto(data.data) != len(data):
                raise AdapterInvalid(f"tensor {name} of {path.name} ends early")
        return data.view(view).reshape(shape)

    def read(self, name: str) -> Matrix:
        """Return a tensor in float32. Raises AdapterInvalid if it is not finite."""
        entry = self.entries[name][1]
        if not entry.shape or entry.dtype == "F32":
            result = self.raw(name)[1]
            if result.dtype != np.float32:
                result = in_float32(entry.dtype, result)
            _check_finite(name, result)
            return result
        result = np.empty(entry.shape, np.float32)
        step = max(1, _CACHED // max(1, result[:1].size))
        for start in range(0, len(result), step):
            rows = slice(start, min(start + step, len(result)))
            data = self.raw(name, rows)[1]
            if (data.view(np.uint16) & 0x7FFF).max(initial=0) >= _INFINITY[entry.dtype]:
                raise _not_finite(name)
            _widen(entry.dtype, data, result[rows])
        return result


def _check_finite(name: str, values: Matrix) -> None:
    if not np.isfinite(values).all():
        raise _not_finite(name)


def _not_finite(name: str) -> AdapterInvalid:
    return AdapterInvalid(f"tensor {name} holds a NaN or an infinity")


def _widen(dtype: str, data: npt.NDArray[Any], result: Matrix) -> None:
    """Do as `in_float32` does, into memory that is there."""
    if dtype == "BF16":
        np.left_shift(data, 16, out=result.view(np.uint32), dtype=np.uint32)
    else:
        result[...] = data


def in_float32(dtype: str, data: npt.NDArray[Any]) -> Matrix:
    """Widen the numbers of a tensor."""
    if dtype == "BF16":  # the upper half of a float32
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.astype(np.float32, copy=False)


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
