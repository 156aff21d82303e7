"""Tests extents: an adapter in one piece, laid out as specified."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.backends.cuda.extent import (
    UNIT_BYTES,
    extent_nbytes,
    extent_of,
    move_bytes,
    pack_extent,
)
from engine.lora.weights import LoraWeights, SiteWeights


def make_weights(dtype: torch.dtype = torch.bfloat16) -> LoraWeights:
    """Make three sites: one with an odd rank and a missing slice, one of rank 1, few columns, and
    one that is only scaled and shifted."""

    def random_values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(0)
    qkv = ((0, 5, 0, 64, random_values(5, 64)), (5, 8, 96, 128, random_values(3, 32)))
    down = ((0, 1, 0, 8, random_values(1, 8)),)
    sites = {
        (0, "qkv"): SiteWeights(random_values(8, 48), qkv, shift=random_values(128).float()),
        (1, "o"): SiteWeights(torch.empty(0, 48, dtype=dtype), (), *torch.rand(2, 72)),
        (3, "down"): SiteWeights(random_values(1, 24), down),
    }
    return LoraWeights("d", sites, sum(s.nbytes for s in sites.values()))


def read(buffer: Tensor, start: int, dtype: torch.dtype, *shape: int) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    return buffer[start : start + count].view(dtype).view(shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_factor_is_where_the_extent_says(dtype: torch.dtype) -> None:
    weights = make_weights(dtype)
    buffer = torch.zeros(extent_nbytes(weights) + 300, dtype=torch.uint8)
    extent = pack_extent(weights, buffer)
    assert extent == extent_of(weights) and extent.nbytes == extent_nbytes(weights)
    assert list(extent.sites) == list(weights.sites)
    for key, site in weights.sites.items():
        place = extent.sites[key]
        shape = place.lora_rank, place.in_features
        assert torch.equal(read(buffer, place.a_bytes, dtype, *shape), site.a)
        for part, (r0, r1, out0, out1, b) in zip(place.slices, site.expands, strict=True):
            assert (part.r0, part.r1, part.out0, part.out1) == (r0, r1, out0, out1)
            assert torch.equal(read(buffer, part.b_bytes, dtype, r1 - r0, out1 - out0), b)
        for start, piece in ((place.scale_bytes, site.scale), (place.shift_bytes, site.shift)):
            assert (start is None) == (piece is None)
            if start is not None and piece is not None:
                assert torch.equal(read(buffer, start, torch.float32, len(piece)), piece)
    assert not buffer[extent.nbytes :].any()


def test_pieces_are_aligned_and_do_not_overlap() -> None:
    weights = make_weights()
    extent = extent_of(weights)
    spans: list[tuple[int, int]] = []
    for key, place in extent.sites.items():
        site = weights.sites[key]
        spans.append((place.a_bytes, place.a_bytes + site.a.nbytes))
        for part, (*_, b) in zip(place.slices, site.expands, strict=True):
            spans.append((part.b_bytes, part.b_bytes + b.nbytes))
        for start, piece in ((place.scale_bytes, site.scale), (place.shift_bytes, site.shift)):
            if start is not None and piece is not None:
                spans.append((start, start + piece.nbytes))
    assert spans == sorted(spans)
    assert all(start % UNIT_BYTES == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert extent.nbytes % UNIT_BYTES == 0
    assert weights.nbytes <= extent.nbytes < weights.nbytes + len(spans) * UNIT_BYTES


@pytest.mark.parametrize(
    "buffer",
    [
        torch.empty(100, dtype=torch.uint8),
        torch.empty(2**16),
        torch.empty(2**8, 2**8, dtype=torch.uint8),
    ],
)
def test_an_unsuitable_buffer_is_refused(buffer: Tensor) -> None:
    with pytest.raises(ValueError, match=r"only uint8 \[>= \d+\] is allowed"):
        pack_extent(make_weights(), buffer)


def test_other_layouts_and_mixed_dtypes_are_refused() -> None:
    weights = make_weights()
    turned = {
        key: replace(site, expands=tuple((*e[:4], e[4].T) for e in site.expands))
        for key, site in weights.sites.items()
    }
    with pytest.raises(ValueError, match=r"only rank-major \(\d+, \d+\) is allowed"):
        extent_of(replace(weights, sites=turned))
    narrow = replace(weights.sites[1, "o"], shift=torch.zeros(71))
    with pytest.raises(ValueError, match=r"float32 \[72\], torch.float32 \[71\]; only float32 of"):
        extent_of(replace(weights, sites={(1, "o"): narrow}))
    other = make_weights(torch.float32).sites[3, "down"]
    mixed = replace(weights, sites={**weights.sites, (3, "down"): other})
    with pytest.raises(ValueError, match=r"torch.bfloat16.*torch.float32"):
        extent_of(mixed)


def test_bytes_move_by_any_distance() -> None:
    rng = random.Random(0)
    for _ in range(200):
        arena = torch.randint(0, 256, (512,), dtype=torch.uint8)
        nbytes = rng.randint(1, 256)
        source, destination = rng.randint(0, 512 - nbytes), rng.randint(0, 512 - nbytes)
        wanted = arena.clone()
        wanted[destination : destination + nbytes] = arena[source : source + nbytes]
        scratch = torch.empty(rng.randint(1, 300), dtype=torch.uint8)
        move_bytes(arena, source, destination, nbytes, scratch)
        assert torch.equal(arena, wanted)
