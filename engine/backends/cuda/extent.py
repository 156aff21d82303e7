"""Packs an adapter into an extent: one piece of memory, which is copied and moved as a whole.

    [ A of the first site | B of its first slice | of its second | ... | A of the next site | ... ]

A is [R, in], with the ranks of the site's slices one after another; B of a slice is rank-major
[r, out_j] and includes the scaling. No rank is padded: rows of both are as wide as the layer, so
that wide loads are possible at any rank. Every piece starts at a multiple of UNIT_BYTES.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.lora.weights import LoraWeights, Site, SiteWeights
from engine.scheduler.extents import EXTENT_ALIGNMENT

UNIT_BYTES = EXTENT_ALIGNMENT  # the scheduler's offsets are multiples of it


@dataclass(frozen=True, slots=True)
class SliceExtent:
    """Rows [r0, r1) of the site's A; B [r1 - r0, out1 - out0] starts at `b_bytes`."""

    r0: int
    r1: int
    out0: int
    out1: int
    b_bytes: int


@dataclass(frozen=True, slots=True)
class SiteExtent:
    a_bytes: int
    lora_rank: int  # sum over the slices
    in_features: int
    slices: tuple[SliceExtent, ...]


@dataclass(frozen=True, slots=True)
class AdapterExtent:
    """The layout of an adapter, in bytes from the start of its extent."""

    digest: str
    dtype: torch.dtype
    sites: dict[Site, SiteExtent]
    nbytes: int  # a multiple of UNIT_BYTES


def extent_of(weights: LoraWeights) -> AdapterExtent:
    """Lay out the sites in the order of `weights`. Raises ValueError if a B is not [r, out]."""
    sites: dict[Site, SiteExtent] = {}
    dtypes: set[torch.dtype] = set()
    end = 0
    for key, site in weights.sites.items():
        _check_shapes(weights.digest, site)
        sites[key] = _site_extent(site, end)
        end += sum(_whole_units(piece.nbytes) for piece in _pieces(site))
        dtypes |= {piece.dtype for piece in _pieces(site)}
    if len(dtypes) != 1:
        raise ValueError(
            f"adapter {weights.digest}: factors are {sorted(map(str, dtypes)) or 'missing'}; "
            "only factors of one dtype are allowed"
        )
    return AdapterExtent(weights.digest, dtypes.pop(), sites, end)


def extent_nbytes(weights: LoraWeights) -> int:
    """Return the number of bytes that `pack_extent` writes."""
    return extent_of(weights).nbytes


def pack_extent(weights: LoraWeights, buffer: Tensor) -> AdapterExtent:
    """Write the extent to the start of `buffer`, uint8 [>= nbytes] on any device; gaps are kept.

    The buffer's address must be a multiple of 16.
    """
    extent = extent_of(weights)
    if buffer.dtype != torch.uint8 or buffer.ndim != 1 or buffer.numel() < extent.nbytes:
        raise ValueError(
            f"adapter {weights.digest}: a buffer {buffer.dtype} {list(buffer.shape)}; "
            f"only uint8 [>= {extent.nbytes}] is allowed"
        )
    start = 0
    for site in weights.sites.values():
        for piece in _pieces(site):
            space = buffer[start : start + piece.nbytes]
            space.view(piece.dtype).view(piece.shape).copy_(piece)
            start += _whole_units(piece.nbytes)
    return extent


def move_bytes(arena: Tensor, source: int, destination: int, nbytes: int, scratch: Tensor) -> None:
    """Copy arena[source:][:nbytes] to arena[destination:], which may overlap; all are uint8.

    If they overlap, pieces go through `scratch` one by one, from the end that is free first.
    """
    if abs(destination - source) >= nbytes:
        arena[destination : destination + nbytes].copy_(arena[source : source + nbytes])
        return
    starts = range(0, nbytes, scratch.numel())
    for start in starts if destination < source else reversed(starts):
        piece = scratch[: min(scratch.numel(), nbytes - start)]
        piece.copy_(arena[source + start : source + start + piece.numel()])
        arena[destination + start : destination + start + piece.numel()].copy_(piece)


def _check_shapes(digest: str, site: SiteWeights) -> None:
    for r0, r1, out0, out1, b in site.expands:
        if b.shape != (r1 - r0, out1 - out0):
            raise ValueError(
                f"adapter {digest}: B {tuple(b.shape)}; only rank-major "
                f"{(r1 - r0, out1 - out0)} is allowed"
            )


def _site_extent(site: SiteWeights, start: int) -> SiteExtent:
    end = start + _whole_units(site.a.nbytes)
    slices: list[SliceExtent] = []
    for r0, r1, out0, out1, b in site.expands:
        slices.append(SliceExtent(r0, r1, out0, out1, end))
        end += _whole_units(b.nbytes)
    return SiteExtent(start, site.a.shape[0], site.a.shape[1], tuple(slices))


def _pieces(site: SiteWeights) -> Iterator[Tensor]:
    yield site.a
    for *_, b in site.expands:
        yield b


def _whole_units(nbytes: int) -> int:
    return -(-nbytes // UNIT_BYTES) * UNIT_BYTES
