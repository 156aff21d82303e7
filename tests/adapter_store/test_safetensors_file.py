"""Wrong headers are refused with a reason; the safetensors library is the oracle."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from safetensors.torch import save_file

from adapter_store.safetensors_file import (
    DTYPE_BITS,
    MAX_DIMENSIONS,
    HeaderLimits,
    find_not_finite,
    hash_file,
    read_header,
    unique_keys,
)

VALID = save({"b": np.ones((2, 3), np.float32), "a": np.zeros(5, np.float16)})


def raw_file(folder: Path, header: Any, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(start: int, end: int, dtype: str = "F32", shape: list[Any] | None = None) -> Any:
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"not json", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        ({"a": []}, "no valid dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "no valid dtype"),
        ({"a": entry(0, 8, shape=[-2])}, "no valid dtype"),
        ({"a": entry(0, 8, shape=[2.0])}, "no valid dtype"),
        ({"a": entry(0, 8, shape=[1] * 9)}, "no valid dtype"),
        ({"a": entry(8, 0, shape=[2])}, "spans -8 bytes"),
        ({"a": entry(0, 8, dtype="F33")}, "unknown dtype 'F33'"),
        ({"a": entry(0, 8, dtype=["F32"])}, "unknown dtype"),  # type: ignore[arg-type]
        ({"a": entry(0, 8, shape=[3])}, "needs 12"),
        ({"a": entry(0, 8, shape=[2**31, 2**31])}, "needs"),
        ({"a": entry(0, 4), "b": entry(0, 8)}, "overlaps"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, "overlaps"),
        ({"a": entry(4, 8)}, "gap"),
        ({"a": entry(0, 16)}, "truncated: .* end at"),
        ({"a": entry(0, 4)}, "4 bytes follow its last tensor"),
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(
    header: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        read_header(raw_file(tmp_path, header, bytes(8)))


def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(ValueError, match="claims 9223372036854775808 bytes, but 2 follow"):
        read_header(path)


LIMITS = HeaderLimits(header_bytes=1000, metadata_chars=20)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"__metadata__": {"a" * 11: "b" * 10}, "a": entry(0, 8)}, "has 21 characters, and 20 are"),
        ({"__metadata__": {"a": ["b"]}, "a": entry(0, 8)}, "'a' is not a text"),
        ({"__metadata__": [], "a": entry(0, 8)}, "not a JSON object"),
        ({"a": entry(0, 8) | {"more": 1}}, "has keys beside"),
        (json.dumps({"a": entry(0, 8)}).encode() + b" " * 1000, "and 1000 are allowed"),
    ],
)
def test_a_header_beyond_the_limits_is_refused(header: Any, reason: str, tmp_path: Path) -> None:
    path = raw_file(tmp_path, header, bytes(8))
    with pytest.raises(ValueError, match=reason):
        read_header(path, LIMITS)


def test_a_header_within_the_limits_is_read(tmp_path: Path) -> None:
    header = {"__metadata__": {"a" * 10: "b" * 10}, "a": entry(0, 8)}
    assert list(read_header(raw_file(tmp_path, header, bytes(8)), LIMITS)) == ["a"]


def test_a_repeated_key_among_many_is_found_in_time_that_grows_as_they_do() -> None:
    def seconds(num: int) -> float:
        pairs = [(f"k{n}", 0) for n in range(num)] + [("twice", 0)] * 2
        began_s = time.process_time()
        with pytest.raises(ValueError, match="'twice' appears twice"):
            unique_keys(pairs)
        return time.process_time() - began_s

    assert seconds(200_000) < 2  # 200,000 searches of a list would take minutes


@pytest.mark.parametrize("length", range(0, len(VALID), 7))
def test_every_truncation_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID[:length])
    with pytest.raises(ValueError, match=r"truncated|claims"):
        read_header(path)


@settings(deadline=None)  # a busy machine is no failure
@given(position=st.integers(0, len(VALID) - 1), byte=st.integers(0, 255))
def test_a_corrupted_header_is_refused_or_read_as_the_library_reads_it(
    position: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Change any byte: the reader refuses, or agrees with the library on every tensor."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(VALID[:position] + bytes([byte]) + VALID[position + 1 :])
    try:
        ours = read_header(path)
    except ValueError:
        return
    try:
        file = safe_open(path, framework="np")
    except SafetensorError as error:
        raise AssertionError(f"accepted what the library refuses: {error}") from error
    with file:
        assert set(ours) == set(file.keys())
        for name, tensor in ours.items():
            assert list(tensor.shape) == file.get_slice(name).get_shape()
            assert tensor.dtype == file.get_slice(name).get_dtype()


# Every number format that torch can hold one element of, under the name that a file gives it.
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
NAMES = st.text(max_size=20).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=MAX_DIMENSIONS)
LAYOUTS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), SHAPES), max_size=6
)
# Not {}: with that and no tensors the library writes a file that it refuses to read.
METADATA = st.none() | st.dictionaries(
    st.text(max_size=20), st.text(max_size=20), min_size=1, max_size=3
)


def random_tensor(dtype: str, shape: list[int], seed: int) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    raw[:] = np.random.default_rng(seed).integers(0, 256, raw.size, np.uint8)
    return tensor


@settings(deadline=None)  # a busy machine is no failure
@given(layout=LAYOUTS, metadata=METADATA)
def test_a_file_of_the_library_is_read_as_the_library_reads_it(
    layout: dict[str, tuple[str, list[int]]],
    metadata: dict[str, str] | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "library.safetensors"
    tensors = {
        name: random_tensor(dtype, shape, seed)
        for seed, (name, (dtype, shape)) in enumerate(layout.items())
    }
    save_file(tensors, path, metadata)
    ours, raw = read_header(path), path.read_bytes()
    with safe_open(path, framework="np") as file:
        assert set(ours) == set(file.keys()) == set(layout)
        for name, entry in ours.items():
            assert entry.dtype == file.get_slice(name).get_dtype() == layout[name][0]
            assert list(entry.shape) == file.get_slice(name).get_shape() == layout[name][1]
            stored = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            assert raw[entry.start : entry.end] == stored


def test_every_dtype_that_torch_holds_has_its_size() -> None:
    for name, dtype in TORCH_DTYPES.items():
        assert DTYPE_BITS[name] == 8 * dtype.itemsize
    assert set(DTYPE_BITS) - set(TORCH_DTYPES) == {"F6_E2M3", "F6_E3M2", "F4"}


def test_a_valid_file_is_read_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID)
    tensors = read_header(path)
    assert {name: t.shape for name, t in tensors.items()} == {"b": (2, 3), "a": (5,)}
    assert [t.num_elements * DTYPE_BITS[t.dtype] // 8 for t in tensors.values()] == [24, 10]
    assert [t.end - t.start for t in tensors.values()] == [24, 10]


@settings(deadline=None)  # a busy machine is no failure
@given(values=st.lists(st.floats(width=32), max_size=40))
def test_not_finite_is_found_wherever_numpy_finds_it(
    values: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "floats.safetensors"
    array = np.array(values, np.float32)
    path.write_bytes(save({"x": array, "y": np.ones(3, np.float32)}))
    expected = None if np.isfinite(array).all() else "x"
    assert find_not_finite(path, read_header(path), lambda _: None) == expected


def test_tensors_larger_than_a_chunk_are_read_to_their_end(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    array = np.zeros(3 * 2**20 // 2 + 1, np.float32)  # 6 MiB and a bit
    array[-1] = np.nan
    path.write_bytes(save({"x": array}))
    seen: list[int] = []
    assert find_not_finite(path, read_header(path), seen.append) == "x"
    seen.clear()
    hash_file(path, seen.append)
    assert sum(seen) == path.stat().st_size
