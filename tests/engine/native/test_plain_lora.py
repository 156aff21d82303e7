"""Tests what references add for an adapter against torch, over odd shapes."""

import ctypes as c

import pytest
import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.library import Context
from engine.backends.native.plain_sites import PlainSites, are_plain
from engine.lora.weights import SiteWeights
from engine.model.layers import LoraSite, LoraSlice

KEY = (3, "qkv")
RANKS, WIDTHS = (5, 0, 17), (300, 33, 40)  # wider than a piece of work; a module without factors
OUT = sum(WIDTHS)


def site_of(in_features: int, affine: str) -> SiteWeights:
    draw = torch.Generator().manual_seed(in_features)
    expands: list[tuple[int, int, int, int, Tensor]] = []
    r0 = out0 = 0
    for rank, width in zip(RANKS, WIDTHS, strict=True):
        if rank:
            b = torch.randn(rank, width, generator=draw).bfloat16()
            expands.append((r0, r0 + rank, out0, out0 + width, b))
        r0, out0 = r0 + rank, out0 + width
    a = torch.randn(r0, in_features, generator=draw).bfloat16()
    scale = torch.randn(OUT, generator=draw) if "scale" in affine else None
    shift = torch.randn(OUT, generator=draw) if "shift" in affine else None
    return SiteWeights(a, tuple(expands), scale, shift)


def right(site: SiteWeights, x: Tensor, y: Tensor) -> Tensor:
    wide = y.double()
    if site.scale is not None:
        wide = wide * site.scale
    if site.shift is not None:
        wide = wide + site.shift
    for r0, r1, out0, out1, b in site.expands:
        wide[:, out0:out1] += x.double() @ site.a[r0:r1].double().T @ b.double()
    return wide


@pytest.mark.parametrize(
    ("num_rows", "in_features", "affine"),
    [(1, 65, ""), (7, 16, "scale"), (4, 33, "shift"), (9, 127, "scale shift")],
)
def test_an_adapter_is_added_as_torch_adds_it(
    context: Context, num_rows: int, in_features: int, affine: str
) -> None:
    site = site_of(in_features, affine)
    slices = tuple(LoraSlice(f"module{i}", width) for i, width in enumerate(WIDTHS))
    sites = [LoraSite(3, "o", 8, slices[:1]), LoraSite(*KEY, in_features, slices)]
    plain = PlainSites({KEY: site}, sites, num_rows, 0)
    draw = torch.Generator().manual_seed(num_rows)
    x = (torch.randn(num_rows, in_features + 3, generator=draw) * in_features**-0.5).bfloat16()
    y = torch.randn(num_rows, OUT + 5, generator=draw).bfloat16()
    before, expected = y.clone(), right(site, x[:, :in_features], y[:, :OUT])
    args = structs.ReefPlainArgs(
        site=c.pointer(plain.struct.sites[1]),
        x=x.data_ptr(),
        x_stride=x.stride(0),
        y=y.data_ptr(),
        y_stride=y.stride(0),
        h=plain.struct.h,
        rows=num_rows,
        in_features=in_features,
    )
    context.function("plain", structs.ReefPlainArgs)(args)
    # Rounded once, to eight bits; the sums themselves are in float32
    torch.testing.assert_close(y[:, :OUT].double(), expected, rtol=2**-8 + 1e-5, atol=1e-4)
    assert torch.equal(y[:, OUT:], before[:, OUT:])
    assert plain.struct.sites[0].out_features == 0  # the adapter has no such layer


def test_factors_of_other_types_are_not_taken() -> None:
    site = site_of(16, "scale")
    assert are_plain({KEY: site})
    assert not are_plain({KEY: SiteWeights(site.a.float(), site.expands)})
    assert not are_plain({KEY: SiteWeights(site.a, site.expands, torch.ones(OUT).double())})
