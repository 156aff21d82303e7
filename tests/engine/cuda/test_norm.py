"""Tests residual addition, norm and FP8 rows against the reference."""

import itertools

import pytest
import torch

from engine.backends.cuda.triton.fp8_rows import quantize_rows
from engine.backends.cuda.triton.launch import MAX_WIDTH
from engine.backends.cuda.triton.norm import add_rms_norm
from engine.model import reference
from engine.model.fp8 import E4M3, E4m3Rows
from engine.model.fp8 import quantize_rows as plainly_quantized

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # One rounding; the interpreter rounds to bfloat16 towards zero
    slack = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=slack, atol=slack)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 72])
def test_norm_matches_the_reference(
    width: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, weight = normal(3, width, dtype=dtype), normal(width, dtype=weight_dtype, seed=1)
    kept, out = x.clone(), torch.full_like(x, torch.nan)
    add_rms_norm(x, None, weight, EPS, out)
    close(out, reference.rms_norm(x, weight, EPS))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leaves", [False, True])
def test_the_residual_is_added_before_the_norm(leaves: bool, dtype: torch.dtype) -> None:
    x, delta = normal(3, 72, dtype=dtype), normal(3, 72, dtype=dtype, seed=1)
    weight, leave = normal(72, seed=2), normal(72, seed=3)
    out, kept = torch.empty_like(x), delta.clone()
    added = reference.rms_norm(delta.float(), leave, EPS) if leaves else delta.float()
    expected = (x.float() + 0.7 * added).to(dtype)
    add_rms_norm(x, delta, weight, EPS, out, scale=0.7, leave=leave if leaves else None)
    close(x, expected)
    close(out, reference.rms_norm(x, weight, EPS))  # of the rounded sum
    assert torch.equal(delta, kept)


def test_a_row_is_the_same_in_any_batch() -> None:
    x, delta, weight = normal(5, 72), normal(5, 72, seed=1), normal(72, seed=2)
    x[3] = torch.nan
    whole = [x.clone(), torch.empty_like(x)]
    add_rms_norm(whole[0], delta, weight, EPS, whole[1])
    for i in (0, 2, 4):
        alone = [x[i : i + 1].clone(), torch.empty(1, 72, device=DEVICE)]
        add_rms_norm(alone[0], delta[i : i + 1], weight, EPS, alone[1])
        assert torch.equal(alone[0][0], whole[0][i]) and torch.equal(alone[1][0], whole[1][i])


def test_rows_may_be_strided_and_there_may_be_none() -> None:
    wide, delta = normal(4, 200), normal(4, 90, seed=1)
    kept, weight = wide.clone(), normal(72, seed=2)
    x, out = wide[:, 100:172], wide[:, 10:82]
    add_rms_norm(x, delta[:, 9:81], weight, EPS, out)
    torch.testing.assert_close(x, kept[:, 100:172] + delta[:, 9:81])
    close(out, reference.rms_norm(x, weight, EPS))
    for untouched in (slice(0, 10), slice(82, 100), slice(172, 200)):
        assert torch.equal(wide[:, untouched], kept[:, untouched])
    add_rms_norm(x[:0], delta[:0, 9:81], weight, EPS, out[:0])


def test_a_row_too_wide_for_a_program_is_refused() -> None:
    x = torch.empty(1, MAX_WIDTH + 1, device=DEVICE)
    with pytest.raises(ValueError, match=f"{MAX_WIDTH + 1} values; at most {MAX_WIDTH}"):
        add_rms_norm(x, None, x[0], EPS, x)


# ==== FP8 ====


def every_value() -> torch.Tensor:
    """List all finite e4m3 values, midpoints, and the adjacent float32 numbers of both."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    exact = values[values.isfinite()].sort().values
    points = torch.cat([exact, (exact[1:] + exact[:-1]) / 2])
    infinity = torch.tensor(torch.inf)
    around = [points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)]
    return torch.cat(around).clamp(-448, 448)


def test_fp8_rounds_every_kind_of_value_as_torch_does() -> None:
    x = every_value()[None].to(DEVICE)
    rows = E4m3Rows.empty(*x.shape, DEVICE)
    quantize_rows(x, rows)
    assert rows.scales.item() == 1.0
    assert torch.equal(rows.codes.view(torch.uint8), x.to(E4M3).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_rows_are_those_of_the_plain_quantizer(dtype: torch.dtype) -> None:
    scale = torch.tensor([0.0, 1e-30, 1e-6, 0.3, 1.0, 1e4], device=DEVICE)[:, None]
    x = (normal(6, 72) * scale).to(dtype)
    expected, rows = plainly_quantized(x), E4m3Rows.empty(6, 72, DEVICE)
    quantize_rows(x, rows)
    assert torch.equal(rows.scales, expected.scales)
    assert torch.equal(rows.codes.float(), expected.codes.float())
    assert rows.codes[3:].float().abs().amax(1).eq(448).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # by numpy, in the interpreter
@pytest.mark.parametrize(("bad", "row"), list(itertools.product([torch.nan, torch.inf], [0, 2])))
def test_nan_and_infinity_stay_in_their_row(bad: float, row: int) -> None:
    x = normal(3, 64)
    clean, rows = plainly_quantized(x), E4m3Rows.empty(3, 64, DEVICE)
    x[row, 5] = bad
    quantize_rows(x, rows)
    found = rows.codes.float() * rows.scales
    assert found[row, 5].isnan()
    others = [i for i in range(3) if i != row]
    assert torch.equal(rows.codes.float()[others], clean.codes.float()[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_can_also_output_fp8(dtype: torch.dtype) -> None:
    x, delta = normal(3, 72, dtype=dtype), normal(3, 72, dtype=dtype, seed=1)
    out, rows = torch.empty_like(x), E4m3Rows.empty(3, 72, DEVICE)
    add_rms_norm(x, delta, normal(72, seed=2), EPS, out, rounded=rows)
    expected = plainly_quantized(out)
    assert torch.equal(rows.scales, expected.scales)
    assert torch.equal(rows.codes.float(), expected.codes.float())
