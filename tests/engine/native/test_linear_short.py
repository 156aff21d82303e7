"""Tests int8 weights that are stored in four bits: results have the bits of the same weights in
int8, whose kernels are tested against plain torch."""

from dataclasses import replace

import pytest
import torch

from engine.backends.native.library import Context
from engine.backends.native.linear import NativeLinear
from engine.model.quantized_weight import QuantizedWeight, dequantize, pack_pairs, unpack_pairs
from tests.engine.support.short_weight import short_weight

# whole and partial panels, one group, an odd number of groups, partial and several slices of 512
SHAPES = [(1, 32), (33, 96), (77, 480), (64, 544), (40, 1184)]
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 31, 70, 197)


def as_int8(weight: QuantizedWeight) -> QuantizedWeight:
    """Return the same weight in int8."""
    assert weight.multipliers is not None
    steps = unpack_pairs(weight.codes).to(torch.int8) - 8
    codes = steps * weight.multipliers.repeat_interleave(32, 1)
    return QuantizedWeight("int8", codes, weight.scales, weight.in_features)


def rows_of(count: int, in_features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, in_features, generator=generator) * torch.rand(count, 1) * 10
    return x.bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_have_the_bits_of_the_same_weight_in_int8(
    context: Context, shape: tuple[int, int]
) -> None:
    weight, bias = short_weight(*shape), torch.randn(shape[0])
    layer = NativeLinear(context, weight, bias, int8_activations=True)
    same = NativeLinear(context, as_int8(weight), bias)
    x = rows_of(max(ROWS), shape[1])
    expected = same(x, torch.float32)
    for rows in ROWS:
        assert torch.equal(layer(x[:rows], torch.float32), expected[:rows]), rows
    assert torch.equal(layer(x[5:80]), expected[5:80].bfloat16())


def test_bits_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    weight, x = short_weight(1100, 224), rows_of(20, 224)
    for rows in (1, 20):
        results = []
        for threads in (1, 4, 9):
            context = Context(isa, threads)
            results.append(NativeLinear(context, weight, int8_activations=True)(x[:rows]))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("rows", [1, 20])
def test_every_code_and_multiplier_is_multiplied_exactly(context: Context, rows: int) -> None:
    """One input of each row is 127, the others 0: y is the weight itself, times that."""
    multipliers = torch.arange(-15, 16, dtype=torch.int8).repeat(2, 1).T.contiguous()
    codes = pack_pairs((torch.arange(64) % 16).to(torch.uint8).repeat(31, 1))
    weight = QuantizedWeight("int4", codes, torch.ones(31, 1), 32, multipliers=multipliers)
    layer = NativeLinear(context, weight, int8_activations=True)
    for first in range(0, 64, rows):
        inputs = torch.arange(first, first + rows) % 64
        x = torch.zeros(rows, 64).index_put((torch.arange(rows), inputs), torch.tensor(127.0))
        y = layer(x.bfloat16(), torch.float32)
        assert torch.equal(y, 127 * dequantize(weight)[:, inputs].T)


@pytest.mark.parametrize("rows", [2, 20])
def test_no_sum_overflows_where_every_product_is_the_largest(isa: str, rows: int) -> None:
    context, x = Context(isa, 2), torch.full((rows, 4096), 127.0).bfloat16()
    x[1::2] = -127
    for code, multiplier in ((0, 15), (0, -15), (15, 15), (15, -15)):
        weight = replace(short_weight(33, 4096), scales=torch.ones(33, 1))
        weight.codes.fill_(code * 17)
        assert weight.multipliers is not None
        weight.multipliers.fill_(multiplier)
        y = NativeLinear(context, weight, int8_activations=True)(x, torch.float32)
        assert torch.equal(y, (x.double() @ dequantize(weight).double().T).float())


def test_nan_and_infinity_stay_in_their_row(isa: str) -> None:
    layer = NativeLinear(Context(isa, 2), short_weight(40, 192), int8_activations=True)
    for rows in (4, 30):
        x = rows_of(rows, 192)
        expected = layer(x)
        x[1, 0], x[2, 100] = float("nan"), float("inf")
        y = layer(x)
        assert not y[1:3].isfinite().any()
        assert torch.equal(y[3:], expected[3:]) and torch.equal(y[0], expected[0])


def test_exact_activations_multiply_the_dequantized_weight(isa: str) -> None:
    weight, x = short_weight(77, 480), rows_of(9, 480)
    y = NativeLinear(Context(isa, 1), weight)(x, torch.float32)
    expected = x.float() @ dequantize(weight).T
    assert float((y - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 64}, "group_size 64 of 96 inputs: with multipliers expected 32"),
        ({"scales": torch.ones(5, 3)}, r"multipliers \(5, 3\), scales \(5, 3\): expected \(5, 3\)"),
        ({"multipliers": torch.ones(5, 2).to(torch.int8)}, r"multipliers \(5, 2\)"),
        ({"multipliers": torch.full((5, 3), -16).to(torch.int8)}, "of up to 16: expected int8"),
        ({"zeros": torch.ones(5, 3)}, "neither zeros nor an input_order"),
    ],
    ids=["group", "scales", "multipliers", "too-large", "zeros"],
)
def test_other_weights_with_multipliers_are_refused(
    isa: str, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        NativeLinear(Context(isa, 1), replace(short_weight(5, 96), **change))  # pyright: ignore
