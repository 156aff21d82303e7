"""Tests linear layers in bf16 and int8 against float64 and exact integers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.library import Context
from engine.backends.native.linear import NativeLinear
from engine.backends.native.memory import BLOCK, Blocks, temporary_bytes
from engine.backends.native.pack import MAX_WIDE_INPUTS, pack_int8_wide
from engine.model.quantized_weight import QuantizedWeight, dequantize

SHAPES = [  # (out, in): 1 x 1, whole panels and words, and neither
    *[(1, 1), (1, 2), (3, 7), (31, 63), (32, 64), (33, 65), (64, 130)],
    *[(70, 897), (100, 96), (129, 1026), (576, 576)],
]
ROWS = [1, 2, 4, 5, 12, 13, 25, 70]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["bf16", "int8", "int8_wide"])
def format(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_bf16_errors_are_within_those_of_float32_sums(
    context: Context, out_features: int, in_features: int
) -> None:
    weight, bias = _weight(out_features, in_features), _random(out_features)
    linear = NativeLinear(context, weight, bias)
    for rows in ROWS:
        x = _x(rows, in_features)
        exact = x.double() @ weight.double().T + bias
        # Each of in_features + 1 additions rounds its result, at most the sum of all magnitudes,
        # by 2^-24 of it; a processor that rounds products as well doubles that.
        magnitude = x.double().abs() @ weight.double().abs().T + bias.abs()
        error = (linear(x, torch.float32) - exact).abs()
        assert (error <= (in_features + 1) * 2**-23 * magnitude).all()


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_int8_is_the_exact_integer_sum_scaled_once(
    context: Context, out_features: int, in_features: int
) -> None:
    weight, bias = _int8_weight(out_features, in_features), _random(out_features)
    linear = NativeLinear(context, weight, bias)
    for rows in ROWS:
        x = _x(rows, in_features)
        assert torch.equal(linear(x, torch.float32), _int8_oracle(x, weight, bias))


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_int8_by_wide_activations_is_the_sum_of_the_exact_sums_of_both_bytes(
    context: Context, out_features: int, in_features: int
) -> None:
    weight, bias = _int8_weight(out_features, in_features), _random(out_features)
    linear = NativeLinear(context, weight, bias, packer=pack_int8_wide)
    for rows in [*ROWS, 3, 6, 7]:
        x = _x(rows, in_features)
        assert torch.equal(linear(x, torch.float32), _wide_oracle(x, weight, bias))


def test_wide_activations_lose_nothing_to_an_outlier(context: Context) -> None:
    weight, x = _int8_weight(70, 256), _x(5, 256)
    x[:, 9] = 100
    exact = x.double() @ dequantize(weight).double().T
    wide = NativeLinear(context, weight, packer=pack_int8_wide)(x, torch.float32)
    narrow = NativeLinear(context, weight)(x, torch.float32)
    assert (wide - exact).norm() < 1e-3 * exact.norm() < (narrow - exact).norm()


def test_wide_activations_do_not_saturate_where_every_product_is_the_largest(
    context: Context,
) -> None:
    weight = QuantizedWeight(
        "int8", torch.full((33, MAX_WIDE_INPUTS), 127).char(), torch.ones(33, 1), MAX_WIDE_INPUTS
    )
    x = torch.tensor([[1.0], [-1.0], [0.498]]).bfloat16().expand(-1, MAX_WIDE_INPUTS)
    x = torch.cat([x, torch.ones(3, MAX_WIDE_INPUTS).bfloat16()])
    y = NativeLinear(context, weight, packer=pack_int8_wide)(x, torch.float32)
    assert torch.equal(y, _wide_oracle(x, weight, torch.zeros(33)))


@pytest.mark.parametrize("magnitude", [0.0, 1e-36, 5e-35, 1e-33, 1e-31, 3e38])
def test_wide_activations_of_any_magnitude_do_not_overflow(
    context: Context, magnitude: float
) -> None:
    weight = _int8_weight(40, 65)
    x = (_x(5, 65).sign() * magnitude).bfloat16()
    y = NativeLinear(context, weight, packer=pack_int8_wide)(x, torch.float32)
    exact = (x.double() @ dequantize(weight).double().T).float()
    torch.testing.assert_close(y, exact, rtol=1e-3, atol=1e-29)


def test_int8_does_not_saturate_where_every_product_is_the_largest(context: Context) -> None:
    in_features = 16384
    codes = torch.full((40, in_features), -128, dtype=torch.int8)
    codes[1::2] = 127
    weight = QuantizedWeight("int8", codes, torch.ones(40, 1), in_features)
    x = torch.ones(3, in_features).bfloat16()
    x[1] = -1
    y = NativeLinear(context, weight)(x, torch.float32)
    assert torch.equal(y, _int8_oracle(x, weight, torch.zeros(40)))


def test_bf16_output_is_the_float_output_rounded_once(context: Context, format: str) -> None:
    linear = _linear(context, format, 70, 100)
    for rows in ROWS:
        x = _x(rows, 100)
        assert torch.equal(linear(x), linear(x, torch.float32).bfloat16())


def test_the_bias_is_added(context: Context, format: str) -> None:
    bias = _random(70)
    x = torch.zeros(5, 33).bfloat16()
    y = _linear(context, format, 70, 33, bias)(x, torch.float32)
    assert torch.equal(y, bias.expand(5, -1))


def test_a_bias_in_bfloat16_counts_as_its_value(context: Context) -> None:
    bias = _random(40).bfloat16()
    y = _linear(context, "bf16", 40, 8, bias)(torch.zeros(1, 8).bfloat16(), torch.float32)
    assert torch.equal(y[0], bias.float())


@pytest.mark.parametrize("in_features", [33, 64, 897])
def test_a_rows_bits_do_not_depend_on_batch_mates(
    context: Context, format: str, in_features: int
) -> None:
    linear = _linear(context, format, 70, in_features, _random(70))
    x = _x(200, in_features)
    alone = torch.cat([linear(x[i : i + 1], torch.float32) for i in range(200)])
    for rows in [2, 3, 4, 5, 8, 11, 12, 13, 16, 24, 25, 63, 200]:
        assert torch.equal(linear(x[:rows], torch.float32), alone[:rows]), rows
    assert torch.equal(linear(x[7:20], torch.float32), alone[7:20])


def test_bits_do_not_depend_on_the_number_of_threads(isa: str, format: str) -> None:
    contexts = [Context(isa, threads) for threads in (1, 2, 3)]
    x = _x(100, 576)
    for rows in (1, 4, 30, 100):
        first, *others = (_linear(each, format, 1000, 576)(x[:rows]) for each in contexts)
        assert all(torch.equal(first, other) for other in others)
    for each in contexts:
        each.close()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("in_features", [1, 33, 64, 97])
@pytest.mark.parametrize("rows", [3, 40])
def test_nan_and_infinity_stay_in_their_row(
    context: Context, format: str, value: float, in_features: int, rows: int
) -> None:
    linear = _linear(context, format, 40, in_features)
    x = _x(rows, in_features)
    clean = linear(x)
    x[1, 0] = value  # directly after the last input of row 0
    y = linear(x)
    assert not y[1].isfinite().any()
    y[1] = clean[1]
    assert torch.equal(y, clean)


def test_int8_of_a_row_with_an_infinity_is_nan(context: Context) -> None:
    x = _x(2, 64)
    x[1, 5] = INF
    y = _linear(context, "int8", 40, 64)(x)
    assert y[1].isnan().all() and y[0].isfinite().all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-36])
def test_int8_of_a_row_of_tiny_values_is_zero(context: Context, magnitude: float) -> None:
    x = torch.full((2, 65), magnitude).bfloat16()
    y = _linear(context, "int8", 40, 65)(x, torch.float32)
    assert torch.equal(y, torch.zeros(2, 40))


def test_rows_may_be_strided(context: Context, format: str) -> None:
    linear = _linear(context, format, 40, 65)
    wide = torch.full((30, 71), NAN).bfloat16()
    wide[:, 3:68] = _x(30, 65)
    for rows in (1, 3, 30):
        apart = wide[:rows, 3:68]
        assert torch.equal(linear(apart), linear(apart.contiguous()))


def test_nothing_is_written_outside_y_and_scratch(context: Context, format: str) -> None:
    linear = _linear(context, format, 41, 65)
    run = context.function("linear", structs.ReefLinearArgs)
    for rows in (1, 5, 30):
        x = _x(rows, 65)
        y = torch.full((rows, 50), 7.0)
        scratch_bytes = linear.scratch_bytes(rows)
        scratch = Blocks().cut(scratch_bytes + 64).fill_(99)
        run(linear.args(x, y[:, :41], scratch))
        assert torch.equal(y[:, :41], linear(x, torch.float32))
        assert (y[:, 41:] == 7).all()
        assert (scratch[scratch_bytes:] == 99).all()


def test_a_batch_may_have_no_rows(context: Context, format: str) -> None:
    assert _linear(context, format, 40, 8)(_x(0, 8)).shape == (0, 40)


def test_a_weight_may_be_a_view_of_another(context: Context) -> None:
    whole, x = _weight(60, 90), _x(3, 40)
    for part in (whole[5:45, 10:50], whole[:40, :40].T):
        y = NativeLinear(context, part)(x)
        assert torch.equal(y, NativeLinear(context, part.contiguous())(x))


def test_the_given_tensors_are_not_kept(context: Context, format: str) -> None:
    weight = _weight(40, 64) if format == "bf16" else _int8_weight(40, 64)
    bias, x = _random(40), _x(3, 64)
    packer = pack_int8_wide if format == "int8_wide" else None
    linear = NativeLinear(context, weight, bias, packer=packer)
    before = linear(x)
    for tensor in [bias, *([weight] if format == "bf16" else [weight.codes, weight.scales])]:
        tensor.zero_()
    assert torch.equal(linear(x), before)


def test_packed_bytes_are_the_weights_padded_to_panels(context: Context) -> None:
    assert NativeLinear(context, _weight(33, 7)).nbytes == 64 * 8 * 2
    assert NativeLinear(context, _int8_weight(33, 7)).nbytes == 64 * 8 + 33 * 4


@pytest.mark.parametrize("make", [Blocks().cut, temporary_bytes])
def test_allocations_are_aligned_and_do_not_overlap(make: Callable[[int], Tensor]) -> None:
    pieces = [make(nbytes) for nbytes in (0, 1, 1000, 64, BLOCK // 4, BLOCK // 4 + 1, 63)]
    for i, piece in enumerate(pieces):
        assert piece.data_ptr() % 64 == 0
        piece.fill_(i)
    for i, nbytes in enumerate((0, 1, 1000, 64, BLOCK // 4, BLOCK // 4 + 1, 63)):
        assert pieces[i].shape == (nbytes,)
        assert (pieces[i] == i).all()


def test_allocations_over_many_blocks_do_not_overlap() -> None:
    blocks = Blocks()
    pieces = [blocks.cut(BLOCK // 4).fill_(i) for i in range(6)]
    assert all((piece == i).all() for i, piece in enumerate(pieces))


def test_unsupported_weights_are_refused_by_name(isa: str) -> None:
    context = Context(isa, 1)
    with pytest.raises(ValueError, match=r"weight torch.float16: expected bfloat16"):
        NativeLinear(context, torch.zeros(4, 4).half())
    with pytest.raises(ValueError, match=r"weight \(4,\): expected \[out, in\]"):
        NativeLinear(context, torch.zeros(4).bfloat16())
    with pytest.raises(ValueError, match=r"weight \(0, 4\): expected \[out, in\]"):
        NativeLinear(context, torch.zeros(0, 4).bfloat16())
    with pytest.raises(ValueError, match="weight format 'fp7': allowed are bf16, int8"):
        NativeLinear(context, QuantizedWeight("fp7", torch.zeros(4, 4), torch.ones(4, 1), 4))
    wide = QuantizedWeight("int8", torch.zeros(1, 65537).char(), torch.ones(1, 1), 65537)
    with pytest.raises(ValueError, match="65537 inputs: at most 65536 are summed"):
        NativeLinear(context, wide, packer=pack_int8_wide)
    with pytest.raises(ValueError, match=r"bias \(3,\): expected \[4\]"):
        NativeLinear(context, _weight(4, 4), torch.zeros(3))


def test_an_input_that_does_not_fit_is_refused(isa: str) -> None:
    linear = _linear(Context(isa, 1), "bf16", 4, 6)
    with pytest.raises(ValueError, match=r"x torch.float32 \(2, 6\): expected bfloat16 \[N, 6\]"):
        linear(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"x torch.bfloat16 \(2, 5\): expected bfloat16 \[N, 6\]"):
        linear(_x(2, 5))
    with pytest.raises(ValueError, match="its last dimension must be contiguous"):
        linear(_x(6, 2).T)
    with pytest.raises(ValueError, match=r"out_dtype torch.float16: allowed are"):
        linear(_x(2, 6), torch.float16)


# ==== layers, inputs and the integer reference ====


def _linear(
    context: Context, format: str, out_features: int, in_features: int, bias: Tensor | None = None
) -> NativeLinear:
    make = _weight if format == "bf16" else _int8_weight
    packer = pack_int8_wide if format == "int8_wide" else None
    return NativeLinear(context, make(out_features, in_features), bias, packer=packer)


def _weight(out_features: int, in_features: int) -> Tensor:
    return _random(out_features, in_features).bfloat16()


def _int8_weight(out_features: int, in_features: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(in_features)
    shape = (out_features, in_features)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    return QuantizedWeight("int8", codes, _random(out_features, 1).abs() + 0.01, in_features)


def _x(rows: int, in_features: int) -> Tensor:
    return (_random(rows, in_features) + 0.1).bfloat16()


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def _int8_oracle(x: Tensor, weight: QuantizedWeight, bias: Tensor) -> Tensor:
    """Compute the sum in integers, with one rounding for each of the two scales.

    The bias is added with the second one: float64 is exact enough to round only once.
    """
    most = x.float().abs().amax(1, keepdim=True)
    q = torch.round(x.float() * (torch.tensor(127.0) / most))
    sums = (q.double() @ weight.codes.double().T).float()
    scaled = sums * weight.scales.flatten()
    return (scaled.double() * (most / 127).double() + bias.double()).float()


def _wide_oracle(x: Tensor, weight: QuantizedWeight, bias: Tensor) -> Tensor:
    """Compute the sums of both bytes in integers, then as the kernel does, one rounding each."""
    most = x.float().abs().amax(1, keepdim=True)
    q = torch.round(x.float() * (torch.tensor(127.0 * 256) / most))
    high = torch.floor((q + 128) / 256)
    low = q - 256 * high
    assert high.abs().max() <= 127 and low.min() >= -128 and low.max() <= 127
    codes = weight.codes.double().T
    upper, lower = (high.double() @ codes).float(), (low.double() @ codes).float()
    scaled = (256 * upper.double() + lower.double()).float() * weight.scales.flatten()
    return (scaled.double() * (most / (127 * 256)).double() + bias.double()).float()
