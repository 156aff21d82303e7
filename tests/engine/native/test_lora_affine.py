"""Tests scales and shifts of outputs, with and without factors, and float outputs, against torch.

Tolerances are those of test_lora_kernels.py; y times its scale is one more product in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.bank import NativeAdapter
from engine.backends.native.library import Context
from engine.backends.native.panels import pack_adapter
from engine.lora.weights import LoraWeights, SiteWeights

KEY = (0, "site")
NAN = float("nan")
EPSILON = 2**-8  # of bfloat16
IN, WIDTHS = 65, (96, 33, 40)
OUT = sum(WIDTHS)


@dataclass(frozen=True, slots=True)
class Adapter:
    site: SiteWeights
    native: NativeAdapter


def adapter(ranks: Sequence[int], affine: str, seed: int) -> Adapter:
    """Make modules of these ranks, 0 for none; `affine` is some of "scale shift", of all outputs
    or, with "last", of those of the last module alone."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    expands: list[tuple[int, int, int, int, Tensor]] = []
    r0 = out0 = 0
    for rank, width in zip(ranks, WIDTHS, strict=True):
        if rank:
            expands.append((r0, r0 + rank, out0, out0 + width, random(rank, width).bfloat16()))
        r0, out0 = r0 + rank, out0 + width
    scale = random(OUT) + 1 if "scale" in affine else None
    shift = random(OUT) if "shift" in affine else None
    if "last" in affine:
        for values, neutral in ((scale, 1.0), (shift, 0.0)):
            if values is not None:
                values[: -WIDTHS[-1]] = neutral
    site = SiteWeights(random(r0, IN).bfloat16(), tuple(expands), scale, shift)
    packed = pack_adapter(LoraWeights(f"adapter-{seed}", {KEY: site}, 0))
    return Adapter(site, NativeAdapter(packed, [KEY]))


ADAPTERS = [
    adapter([4, 4, 4], "scale", 0),
    adapter([3, 0, 16], "scale shift", 1),
    adapter([0, 0, 0], "shift", 2),
    adapter([5, 0, 0], "scale shift last", 3),
    adapter([64, 2, 0], "", 4),
    adapter([0, 7, 0], "shift", 5),
]
# decodes, a prefill of 40 rows, and rows of the base
OF_ROW = [0, 1, 2, 3, 4, 5, -1, 1, 1, 2, 2, 2, *[1] * 40, *[2] * 9, *[3] * 5, -1]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(len(OF_ROW), IN, generator=generator) * IN**-0.5
    return x.bfloat16(), torch.randn(len(OF_ROW), OUT + 5, generator=generator).to(dtype)


def add(context: Context, of_row: Sequence[int], x: Tensor, y: Tensor) -> Tensor:
    """Run the kernels in place; return y [rows, OUT]."""
    rows: list[int] = []
    segments: list[structs.ReefLoraSegment] = []
    for index in sorted(set(of_row) - {-1}):
        start = len(rows)
        rows += [row for row, i in enumerate(of_row) if i == index]
        segments.append(
            structs.ReefLoraSegment(ADAPTERS[index].native.table.pointer, start, len(rows))
        )
    listed = torch.tensor(rows, dtype=torch.int32)
    h = torch.full((max(1, len(rows)), 66), NAN).bfloat16()
    batch = structs.ReefLoraBatch(
        (structs.ReefLoraSegment * len(segments))(*segments), listed.data_ptr(), len(segments), 66
    )
    context.function("lora", structs.ReefLoraArgs)(
        structs.ReefLoraArgs(
            batch=structs.c.pointer(batch),
            site=0,
            in_features=IN,
            x=x.data_ptr(),
            x_stride=x.stride(0),
            y=y.data_ptr(),
            y_stride=y.stride(0),
            h=h.data_ptr(),
            h_stride=h.stride(0),
            y_is_float=y.dtype == torch.float32,
        )
    )
    return y[:, :OUT]


def expected(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return y in float32, and its allowed error."""
    is_float, y = y.dtype == torch.float32, y[:, :OUT].float()
    rounding = 2**-20 if is_float else EPSILON
    error = torch.zeros_like(y)
    for row, index in enumerate(OF_ROW):
        if index < 0:
            continue
        site = ADAPTERS[index].site
        scale, shift = site.scale, site.shift
        if scale is not None:
            y[row] *= scale
        if shift is not None:
            y[row] += shift
        error[row] = y[row].abs() * rounding
        for r0, r1, out0, out1, b in site.expands:
            a = site.a[r0:r1].float()
            h = (a @ x[row].float()).bfloat16().float()
            y[row, out0:out1] += h @ b.float()
            off = h.abs() * EPSILON + (a.abs() @ x[row].float().abs()) * 2**-20
            error[row, out0:out1] += off @ b.float().abs()
    return y, error + y.abs() * rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_row_gets_the_scale_the_shift_and_the_factors_of_its_adapter(
    context: Context, dtype: torch.dtype
) -> None:
    x, y = inputs(dtype)
    right, error = expected(x, y)
    behind, base = y[:, OUT:].clone(), y[[6, -1]].clone()
    got = add(context, OF_ROW, x, y)
    worst = ((got.float() - right).abs() / error.clamp_min(1e-30)).nan_to_num(9).max().item()
    assert worst <= 1, f"{worst:.2f} times the error that is allowed"
    assert torch.equal(y[:, OUT:], behind) and torch.equal(y[[6, -1]], base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_rows_bits_do_not_depend_on_batch_mates(context: Context, dtype: torch.dtype) -> None:
    x, y = inputs(dtype)
    before = y.clone()
    together = add(context, OF_ROW, x, y)
    for row in range(0, len(OF_ROW), 5):
        alone = add(context, [OF_ROW[row]], x[[row]], before[[row]])
        assert torch.equal(alone[0], together[row])
    backwards = add(context, OF_ROW[::-1], x.flip(0), before.flip(0))
    assert torch.equal(backwards.flip(0), together)


def test_outputs_that_are_neither_scaled_nor_shifted_keep_their_bits(context: Context) -> None:
    """This adapter changes its first module by factors, and its last one by scale and shift."""
    x, y = inputs(torch.bfloat16)
    row = OF_ROW.index(3)
    y[row] = -0.0  # times one, plus zero, it would be 0.0
    got = add(context, OF_ROW, x, y)[row]
    assert (got[:96] != 0).all() and (got[129:] != 0).all()
    assert torch.equal(got[96:129].view(torch.int16), torch.full((33,), -0x8000).short())
