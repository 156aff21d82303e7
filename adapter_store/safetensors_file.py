"""Read a safetensors file without trusting it: its header, its hash, whether numbers are finite.

Knows no LoRA and no meaning of tensors. Raises OSError, or ValueError with the reason, to which the
caller adds the name of the file.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from adapter_store.object_store import CHUNK_BYTES, OnBytes

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 8
_DTYPES_BY_BITS = {
    64: "F64 I64 U64 C64",
    32: "F32 I32 U32",
    16: "F16 BF16 I16 U16",
    8: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    6: "F6_E2M3 F6_E3M2",
    4: "F4",
}
DTYPE_BITS = {name: bits for bits, names in _DTYPES_BY_BITS.items() for name in names.split()}
# A number is not finite when all bits of its exponent are set: (unsigned view, exponent mask).
_EXPONENTS = {
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; its bytes are [start, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """Bound a header whose writer is not trusted; then tensors may have no further keys either."""

    header_bytes: int
    metadata_chars: int  # of all names and texts in __metadata__ together


def read_header(path: Path, limits: HeaderLimits | None = None) -> dict[str, TensorEntry]:
    """Read all tensors by name, in file order; ValueError unless they fit the file exactly.

    A header beyond the limits' bytes is refused before it is read.
    """
    max_bytes = MAX_HEADER_BYTES if limits is None else limits.header_bytes
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(
                f"it is truncated: {size} bytes, not even the 8 of the header's length"
            )
        length = int.from_bytes(prefix, "little")
        if length > size - 8:
            raise ValueError(f"its header claims {length} bytes, but {size - 8} follow")
        if length > max_bytes:
            raise ValueError(f"its header has {length} bytes, and {max_bytes} are allowed")
        header = _parse_json(file.read(length))
    if limits is not None:
        _check_limits(header, limits)
    entries = [
        (name, _entry(name, value, 8 + length))
        for name, value in header.items()
        if name != "__metadata__"
    ]
    entries.sort(key=lambda item: (item[1].start, item[1].end))
    _check_layout(entries, 8 + length, size)
    return dict(entries)


def find_not_finite(path: Path, tensors: dict[str, TensorEntry], on_bytes: OnBytes) -> str | None:
    """Return the first tensor that holds a NaN or an infinity, or None.

    All tensors must be F32, F16 or BF16. `on_bytes` is called with the bytes read since its last
    call.
    """
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            view, mask = _EXPONENTS[tensor.dtype]
            file.seek(tensor.start)
            remaining = tensor.end - tensor.start
            while remaining:
                # CHUNK_BYTES is a multiple of every element size, so no element is split.
                chunk = file.read(min(CHUNK_BYTES, remaining))
                if not chunk:
                    raise ValueError(f"it became shorter while tensor {name} was read")
                if np.any(np.bitwise_and(np.frombuffer(chunk, view), mask) == mask):
                    return name
                remaining -= len(chunk)
                on_bytes(len(chunk))
    return None


def hash_file(path: Path, on_bytes: OnBytes) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict for json.loads; ValueError for a repeated key.

    Other readers may take the other of its values.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name!r} appears twice")
            seen.add(name)
    return result


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return cast("dict[str, Any]", header)


def _check_limits(header: dict[str, Any], limits: HeaderLimits) -> None:
    metadata = header.get("__metadata__")
    if metadata is None:  # MLX writes null
        metadata = {}
    if not isinstance(metadata, dict):
        raise ValueError("its __metadata__ is not a JSON object")
    num_chars = 0
    for name, text in cast("dict[str, Any]", metadata).items():
        if not isinstance(text, str):
            raise ValueError(f"its __metadata__ {name!r} is not a text")
        num_chars += len(name) + len(text)
    if num_chars > limits.metadata_chars:
        raise ValueError(
            f"its __metadata__ has {num_chars} characters, and {limits.metadata_chars} are allowed"
        )
    for name, value in header.items():
        if (
            name != "__metadata__"
            and isinstance(value, dict)
            and len(cast("dict[str, Any]", value)) > 3
        ):
            raise ValueError(f"tensor {name!r} has keys beside dtype, shape and data_offsets")


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        sizes = [*shape, start, end]
        if len(sizes) > MAX_DIMENSIONS + 2 or not all(
            type(number) is int and 0 <= number < 2**62 for number in sizes
        ):
            raise ValueError("negative, not whole, or too many")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tensor {name!r} has no valid dtype, shape and data_offsets") from error
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    expected = math.prod(shape) * bits
    if expected != (end - start) * 8:
        raise ValueError(
            f"tensor {name!r} spans {end - start} bytes, but {dtype} {list(shape)} needs "
            f"{expected / 8:g}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + end)


def _check_layout(entries: list[tuple[str, TensorEntry]], start: int, size: int) -> None:
    """Check that tensors tile the rest of the file: no gap, no overlap, nothing past the end."""
    end = start
    for name, entry in entries:
        if entry.start != end:
            kind = (
                "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
            )
            raise ValueError(f"tensor {name!r} {kind}")
        end = entry.end
    if end > size:
        raise ValueError(f"it is truncated: {size} bytes, but its tensors end at {end}")
    if end < size:
        raise ValueError(f"{size - end} bytes follow its last tensor")
