"""Tests that linear layers computed in AMX tiles have the bits of those computed by vectors.

The others are tested against plain torch; here every result must equal theirs.
"""

import pytest
import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.library import Context
from engine.backends.native.linear import NativeLinear
from engine.backends.native.memory import Blocks
from engine.backends.native.pack import Packer, pack_int8_wide
from engine.model.quantized_weight import QuantizedWeight
from tests.engine.support.short_weight import short_weight

ROWS = [1, 3, 4, 5, 15, 16, 17, 31, 33, 48, 65, 131, 300]
FORMATS = ["int8", "int8-wide", "nf4", "int4", "int4-ordered", "int4-symmetric", "int4-short"]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(1, 1), (3, 7), (33, 65), (64, 130), (70, 897), (129, 1026), (40, 4096), (577, 576)],
)
@pytest.mark.parametrize("packer", [None, pack_int8_wide], ids=["int8", "int8-wide"])
def test_int8_has_the_bits_of_the_vector_kernel(
    amx: Context, vectors: Context, packer: Packer | None, out_features: int, in_features: int
) -> None:
    weight, bias = _int8_weight(out_features, in_features), torch.randn(out_features)
    a, b = (NativeLinear(c, weight, bias, packer=packer) for c in (amx, vectors))
    _compare(a, b, ROWS)


@pytest.mark.parametrize("format", FORMATS[2:6])
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"),
    [(1, 32, 32), (33, 224, 32), (77, 448, 64), (100, 640, 128), (31, 288, 96), (45, 2048, 512)],
)
def test_fourbit_has_the_bits_of_the_vector_kernel(
    amx: Context,
    vectors: Context,
    format: str,
    out_features: int,
    in_features: int,
    group_size: int,
) -> None:
    weight = _fourbit_weight(format, out_features, in_features, group_size)
    bias = torch.randn(out_features)
    a, b = (NativeLinear(c, weight, bias, int8_activations=True) for c in (amx, vectors))
    _compare(a, b, ROWS)


@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(1, 32), (33, 96), (77, 480), (64, 544), (40, 2080), (129, 1024)],
)
def test_short_int8_has_the_bits_of_the_vector_kernel(
    amx: Context, vectors: Context, out_features: int, in_features: int
) -> None:
    weight, bias = short_weight(out_features, in_features), torch.randn(out_features)
    a, b = (NativeLinear(c, weight, bias, int8_activations=True) for c in (amx, vectors))
    _compare(a, b, ROWS)


def test_int8_does_not_overflow_where_every_product_is_the_largest(
    amx: Context, vectors: Context
) -> None:
    codes = torch.full((40, 16384), -128, dtype=torch.int8)
    codes[1::2] = 127
    weight = QuantizedWeight("int8", codes, torch.ones(40, 1), 16384)
    x = torch.ones(20, 16384).bfloat16()
    x[1::2] = -1
    a, b = NativeLinear(amx, weight), NativeLinear(vectors, weight)
    assert torch.equal(a(x, torch.float32), b(x, torch.float32))


@pytest.mark.parametrize("format", FORMATS)
def test_nan_and_infinity_stay_in_their_row(amx: Context, format: str) -> None:
    layer, x = _layer(amx, format), torch.randn(40, 192).bfloat16()
    clean = layer(x)
    x[1, 0], x[33, 100] = NAN, INF
    y = layer(x)
    assert not y[[1, 33]].isfinite().any()
    y[[1, 33]] = clean[[1, 33]]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_written_outside_y_and_scratch(amx: Context, format: str) -> None:
    layer = _layer(amx, format)
    run = amx.function("linear", structs.ReefLinearArgs)
    for rows in (5, 17, 40):
        x = torch.randn(rows, 192).bfloat16()
        y = torch.full((rows, 60), 7.0)
        scratch_bytes = layer.scratch_bytes(rows)
        scratch = Blocks().cut(scratch_bytes + 64).fill_(99)
        run(layer.args(x, y[:, :41], scratch))
        assert torch.equal(y[:, :41], layer(x, torch.float32))
        assert (y[:, 41:] == 7).all() and (scratch[scratch_bytes:] == 99).all()


@pytest.mark.parametrize("format", FORMATS)
def test_rows_may_be_strided_and_y_in_bfloat16(amx: Context, format: str) -> None:
    layer, wide = _layer(amx, format), torch.randn(40, 250).bfloat16()
    x = wide[:, 3:195]
    assert torch.equal(layer(x), layer(x.contiguous(), torch.float32).bfloat16())


# ==== layers ====


def _compare(a: NativeLinear, b: NativeLinear, counts: list[int]) -> None:
    x = torch.randn(max(counts), a.in_features).bfloat16() * torch.rand(max(counts), 1) * 10
    x = x.bfloat16()
    expected = b(x, torch.float32)
    for rows in counts:
        assert torch.equal(a(x[:rows], torch.float32), expected[:rows]), rows
    assert torch.equal(a(x[7:40], torch.float32), expected[7:40])


def _layer(context: Context, format: str) -> NativeLinear:
    packer = pack_int8_wide if format == "int8-wide" else None
    if format == "int4-short":
        weight = short_weight(41, 192)
    elif "int8" in format:
        weight = _int8_weight(41, 192)
    else:
        weight = _fourbit_weight(format, 41, 192, 64)
    return NativeLinear(context, weight, torch.randn(41), int8_activations=True, packer=packer)


def _int8_weight(out_features: int, in_features: int) -> QuantizedWeight:
    codes = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
    return QuantizedWeight("int8", codes, torch.rand(out_features, 1) + 0.01, in_features)


def _fourbit_weight(
    format: str, out_features: int, in_features: int, group_size: int
) -> QuantizedWeight:
    codes = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8)
    scales = torch.rand(out_features, in_features // group_size) + 0.5
    zeros: Tensor | None = None
    if format != "nf4":
        zeros = torch.rand(scales.shape) * 16
    if format == "int4-symmetric":
        zeros = torch.full(scales.shape, 8.0)
    order = torch.randperm(in_features).int() if format == "int4-ordered" else None
    return QuantizedWeight(format.partition("-")[0], codes, scales, group_size, zeros, order)
