"""Tests the 4-bit linear kernels against the float32 product of the dequantized weight."""

from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from engine.backends.native.library import Context
from engine.backends.native.linear import NativeLinear
from engine.model.quantized_weight import NF4_VALUES, QuantizedWeight, dequantize

# (in_features, out_features, group_size): whole and partial panels, groups smaller than, equal to
# and larger than a slice of 256 inputs, partial slices, one group for the whole row
SHAPES = [
    (32, 1, 32),
    (64, 32, 64),
    (224, 33, 32),
    (448, 77, 64),
    (640, 100, 128),
    (768, 40, 256),
    (288, 31, 96),
    (1024, 45, 512),
    (608, 64, 608),
]
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 70)


@dataclass(frozen=True)
class Case:
    """A format, with the bound on its error.

    The error of a product is a random sum of errors of the kernel's table and of rounding.
    """

    format: str
    int8_activations: bool = False
    with_order: bool = False
    is_symmetric: bool = False
    bound: float = 0.0  # on |error| / |y|, norms over all of y


# nf4: the table is 0.08 % of a weight's norm away from the true values.
# int4: the values are exact and only float32 sums round.
# int8 activations: nf4's table is 0.5 % away; x is rounded to steps of max |x| of a group / 127,
# which is 0.6 % of Gaussian x.
CASES = [
    Case("nf4", bound=0.0015),
    Case("nf4", int8_activations=True, bound=0.011),
    Case("int4", bound=1e-5),
    Case("int4", with_order=True, bound=1e-5),
    Case("int4", int8_activations=True, with_order=True, bound=0.013),
    Case("int4", int8_activations=True, is_symmetric=True, bound=0.013),
]
case_ids = [
    *("nf4", "nf4-int8", "int4", "int4-ordered"),
    *("int4-int8-ordered", "int4-int8-symmetric"),
]
all_cases = pytest.mark.parametrize("case", CASES, ids=case_ids)


@lru_cache
def context_of(isa: str, threads: int) -> Context:
    """Make a context that lives as long as the tests: a layer does not keep its own."""
    return Context(isa, threads)


def random_weight(case: Case, in_features: int, out_features: int, group_size: int):
    generator = torch.Generator().manual_seed(in_features + out_features)
    groups = in_features // group_size
    codes = torch.randint(
        0, 256, (out_features, in_features // 2), generator=generator, dtype=torch.uint8
    )
    scales = torch.rand(out_features, groups, generator=generator) + 0.5
    zeros = torch.randint(0, 17, scales.shape, generator=generator).float()
    if case.is_symmetric:
        zeros.fill_(8)
    order = torch.randperm(in_features, generator=generator).int()
    return QuantizedWeight(
        case.format,
        codes,
        scales,
        group_size,
        zeros if case.format == "int4" else None,
        order if case.with_order else None,
    )


def random_rows(rows: int, in_features: int) -> Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).bfloat16()


def layer_of(
    context: Context, case: Case, weight: QuantizedWeight, bias: Tensor | None = None
) -> NativeLinear:
    return NativeLinear(context, weight, bias, int8_activations=case.int8_activations)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.float() - expected).norm() / expected.norm())


@all_cases
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_y_is_x_times_the_dequantized_weight(
    context: Context, case: Case, shape: tuple[int, int, int]
) -> None:
    weight = random_weight(case, *shape)
    layer = layer_of(context, case, weight)
    for rows in (1, 8, 70):
        x = random_rows(rows, shape[0])
        expected = x.float() @ dequantize(weight).T
        # a single sum of few terms may have a larger error than the norm of many
        bound = case.bound * (5 if expected.numel() < 100 else 1)
        assert error(layer(x, torch.float32), expected) < bound


@all_cases
def test_bf16_output_is_the_float32_output_rounded(isa: str, case: Case) -> None:
    layer = layer_of(context_of(isa, 2), case, random_weight(case, 448, 77, 64))
    for rows in (3, 20):
        x = random_rows(rows, 448)
        assert torch.equal(layer(x), layer(x, torch.float32).bfloat16())


@all_cases
def test_bias_is_added(isa: str, case: Case) -> None:
    weight, bias = random_weight(case, 128, 45, 64), torch.randn(45)
    context = context_of(isa, 1)
    for rows in (2, 30):
        x = random_rows(rows, 128)
        without = layer_of(context, case, weight)(x, torch.float32)
        assert torch.equal(layer_of(context, case, weight, bias)(x, torch.float32), without + bias)


@all_cases
def test_a_rows_bits_do_not_depend_on_batch_mates(context: Context, case: Case) -> None:
    weight = random_weight(case, 480, 99, 96)
    layer, x = layer_of(context, case, weight), random_rows(200, 480)
    alone = torch.cat([layer(row[None], torch.float32) for row in x])
    for rows in (*ROWS, 97, 200):
        assert torch.equal(layer(x[:rows], torch.float32), alone[:rows])
    assert torch.equal(layer(x[37:150], torch.float32), alone[37:150])


@all_cases
def test_bits_do_not_depend_on_the_number_of_threads(isa: str, case: Case) -> None:
    weight = random_weight(case, 512, 1100, 64)
    x = random_rows(20, 512)
    for rows in (1, 20):
        results = [layer_of(context_of(isa, n), case, weight)(x[:rows]) for n in (1, 2, 3, 4, 9)]
        assert all(torch.equal(result, results[0]) for result in results)


@all_cases
def test_rows_may_be_strided(isa: str, case: Case) -> None:
    layer = layer_of(context_of(isa, 2), case, random_weight(case, 192, 50, 64))
    wide = random_rows(40, 500)
    for rows in (1, 5, 40):
        x = wide[:rows, 7 : 7 + 192]
        assert torch.equal(layer(x), layer(x.contiguous()))


@all_cases
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(isa: str, case: Case, poison: float) -> None:
    layer = layer_of(context_of(isa, 2), case, random_weight(case, 256, 64, 64))
    for rows in (4, 30):
        clean = random_rows(rows, 256)
        dirty = clean.clone()
        dirty[1, 100] = poison
        y, expected = layer(dirty), layer(clean)
        others = torch.arange(rows) != 1
        assert torch.equal(y[others], expected[others])
        assert not y[1].isfinite().any()


@all_cases
def test_zero_scales_give_zeros_and_zero_rows_give_zeros(isa: str, case: Case) -> None:
    weight = random_weight(case, 256, 40, 64)
    weight.scales[7] = 0
    layer, x = layer_of(context_of(isa, 1), case, weight), random_rows(12, 256)
    x[3] = 0
    for rows in (5, 12):
        y = layer(x[:rows])
        assert (y[:, 7] == 0).all() and (y[3] == 0).all()
        assert (y[0, :7] != 0).all()


@all_cases
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scales_of_any_size_keep_their_accuracy(isa: str, case: Case, size: float) -> None:
    weight = random_weight(case, 256, 64, 64)
    # every other group has scales out of range of any float narrower than float32
    weight = replace(weight, scales=weight.scales * size)
    x = random_rows(20, 256)
    y = layer_of(context_of(isa, 2), case, weight)(x, torch.float32)
    assert error(y / size, x.float() @ (dequantize(weight) / size).T) < case.bound


@pytest.mark.parametrize("rows", [1, 16])
def test_int4_is_exact_if_all_values_of_x_are_equal(isa: str, rows: int) -> None:
    """Use zero points far from the middle and a constant x: the two sums nearly cancel."""
    weight = replace(random_weight(CASES[2], 512, 64, 128), scales=torch.ones(64, 4))
    weight = replace(weight, zeros=torch.randint(0, 17, (64, 4)).float())
    x = torch.full((rows, 512), 3.0).bfloat16()
    y = layer_of(context_of(isa, 1), CASES[2], weight)(x, torch.float32)
    assert torch.equal(y, x.float() @ dequantize(weight).T)  # whole numbers below 2^24


@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=["bf16", "int8"])
def test_int4_supports_fractional_zero_points(isa: str, case: Case) -> None:
    weight = random_weight(case, 256, 64, 64)
    weight = replace(weight, zeros=weight.zeros + 0.375)
    x = random_rows(9, 256)
    y = layer_of(context_of(isa, 1), case, weight)(x, torch.float32)
    assert error(y, x.float() @ dequantize(weight).T) < case.bound


def test_an_outlier_among_int8_activations_coarsens_its_own_group_alone(isa: str) -> None:
    case = CASES[1]
    weight, x = random_weight(case, 256, 64, 64), random_rows(20, 256)
    x[:, 7] = 1000
    weight.codes[:, :32] = 0x77  # nf4's zero: the outlier's group adds nothing to y
    y = layer_of(context_of(isa, 1), case, weight)(x, torch.float32)
    assert error(y, x.float() @ dequantize(weight).T) < case.bound


def test_int8_activations_do_not_overflow_where_every_product_is_the_largest(isa: str) -> None:
    for case, code in ((CASES[1], 0xFF), (CASES[1], 0x00), (CASES[4], 0xFF), (CASES[5], 0x00)):
        weight = random_weight(case, 256, 64, 128)
        weight.codes.fill_(code)
        layer = layer_of(context_of(isa, 1), case, weight)
        for value in (3.0, -3.0):
            x = torch.full((6, 256), value).bfloat16()
            assert error(layer(x, torch.float32), x.float() @ dequantize(weight).T) < 0.005


@pytest.mark.parametrize(
    ("int8_activations", "largest"), [(False, 0.0018), (True, 0.027)], ids=["bf16", "int8"]
)
def test_each_nf4_value_is_close_to_its_exact_one(
    isa: str, int8_activations: bool, largest: float
) -> None:
    """Test every code alone: one input is 1, the others 0."""
    codes = torch.arange(16, dtype=torch.uint8)[:, None].repeat(1, 16)
    weight = QuantizedWeight("nf4", codes, torch.ones(16, 1), 32)
    layer = NativeLinear(context_of(isa, 1), weight, int8_activations=int8_activations)
    x = torch.zeros(1, 32).bfloat16()
    x[0, 6] = 1
    y, expected = layer(x, torch.float32)[0], torch.tensor(NF4_VALUES)
    assert ((y - expected).abs() <= largest * expected.abs()).all()


@pytest.mark.parametrize("group_size", [16, 48, 128, 0, -32])
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_other_group_sizes_are_refused(isa: str, format: str, group_size: int) -> None:
    weight = replace(random_weight(Case(format), 192, 32, 64), group_size=group_size)
    with pytest.raises(ValueError, match=f"group_size {group_size} of 192 inputs"):
        NativeLinear(context_of(isa, 1), weight)


def test_an_input_order_that_is_no_permutation_is_refused(isa: str) -> None:
    weight = random_weight(CASES[3], 64, 32, 64)
    weight = replace(weight, input_order=torch.full((64,), 63, dtype=torch.int32))
    with pytest.raises(ValueError, match="no permutation of the 64 inputs"):
        NativeLinear(context_of(isa, 1), weight)


def test_an_input_order_of_nf4_is_refused(isa: str) -> None:
    weight = random_weight(CASES[0], 64, 32, 64)
    weight = replace(weight, input_order=torch.arange(64, dtype=torch.int32))
    with pytest.raises(ValueError, match="no input_order"):
        NativeLinear(context_of(isa, 1), weight)


def test_scales_and_zeros_of_another_shape_are_refused(isa: str) -> None:
    weight = random_weight(CASES[2], 128, 32, 64)
    with pytest.raises(ValueError, match=r"scales \(32, 1\)"):
        NativeLinear(
            context_of(isa, 1),
            replace(weight, scales=weight.scales[:, :1], zeros=torch.ones(32, 1)),
        )


@pytest.mark.parametrize("case", [CASES[2], CASES[5]], ids=["bf16", "int8"])
def test_int4_without_zeros_counts_from_eight(isa: str, case: Case) -> None:
    weight, x = random_weight(CASES[5], 192, 40, 64), random_rows(5, 192)
    without, eights = (
        layer_of(context_of(isa, 1), case, replace(weight, zeros=zeros))
        for zeros in (None, torch.full_like(weight.scales, 8.0))
    )
    assert torch.equal(without(x), eights(x))
