"""Packs adapters for the native kernels, with B in panels of columns.

A panel of B is [ceil(r / 2), 32, 2]: neighbouring ranks of neighbouring columns side by side,
padded with zeros. Columns that are scaled or shifted without factors have a B of rank 0. Large
adapters have their own huge pages, in the order in which a step reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.native.memory import ALIGNMENT, separate_bytes
from engine.lora.weights import Expand, LoraWeights, Sites, SiteWeights

PANEL = 32
LARGE = 4 * 2**20  # bytes; adapters of at least this size have their own huge pages


@dataclass(frozen=True, slots=True)
class PanelWeights:
    """One adapter, each B as [ceil(out / 32), ceil(r / 2), 32, 2]; ValueError for other shapes."""

    digest: str
    sites: Sites
    nbytes: int  # in memory, padding included

    def __post_init__(self) -> None:
        for *_, b in (expand for site in self.sites.values() for expand in site.expands):
            if b.dim() != 4 or b.shape[2:] != (PANEL, 2):
                raise ValueError(
                    f"adapter {self.digest}: B {tuple(b.shape)}; only panels are allowed"
                )


def pack_adapter(weights: LoraWeights) -> PanelWeights:
    """Pack factors of 2 bytes; called in the host cache's threads. The weights are not kept."""
    sizes = [size for site in weights.sites.values() for size in _sizes(site)]
    nbytes = sum(sizes)
    if nbytes < LARGE:
        spaces = (torch.empty(size, dtype=torch.uint8) for size in sizes)
    else:
        block = separate_bytes(sum(map(_aligned, sizes)))
        nbytes, spaces = block.nbytes, _cut(block, sizes)
    sites = {key: _packed(site, spaces) for key, site in weights.sites.items()}
    return PanelWeights(weights.digest, sites, nbytes)


def _sizes(site: SiteWeights) -> Iterator[int]:
    """Yield the bytes of A, of each packed B, and of scale and shift."""
    yield site.a.nbytes
    for *_, b in site.expands:
        yield prod(_panels(b)) * PANEL * 2 * b.itemsize
    yield from (affine.nbytes for affine in (site.scale, site.shift) if affine is not None)


def _packed(site: SiteWeights, spaces: Iterator[Tensor]) -> SiteWeights:
    a = next(spaces).view(site.a.dtype).view(site.a.shape).copy_(site.a)
    expands = [(*e[:4], _in_panels(e[4], next(spaces))) for e in site.expands]
    scale, shift = (
        None if affine is None else next(spaces).view(torch.float32).copy_(affine)
        for affine in (site.scale, site.shift)
    )
    return SiteWeights(a, (*expands, *_without_factors(site)), scale, shift)


def _without_factors(site: SiteWeights) -> Iterator[Expand]:
    """Yield the columns between those of the factors that are scaled or shifted."""
    affine = next((t for t in (site.scale, site.shift) if t is not None), None)
    if affine is None:
        return
    start, rank = 0, len(site.a)
    spans = sorted((out0, out1) for _, _, out0, out1, _ in site.expands)
    for out0, out1 in [*spans, (len(affine), len(affine))]:
        if start < out0 and _changes(site, slice(start, out0)):
            b = torch.empty(-(-(out0 - start) // PANEL), 0, PANEL, 2, dtype=site.a.dtype)
            yield rank, rank, start, out0, b
        start = out1


def _changes(site: SiteWeights, columns: slice) -> bool:
    scaled = site.scale is not None and bool((site.scale[columns] != 1).any())
    return scaled or (site.shift is not None and bool(site.shift[columns].any()))


def _in_panels(b: Tensor, space: Tensor) -> Tensor:
    """Write B [r, out] as panels to this memory.

    Moves words that hold two ranks each, which torch does faster than single values.
    """
    num_panels, num_pairs = _panels(b)
    halves = _padded(b).view(torch.uint16)
    words = halves[1::2].int().bitwise_left_shift_(16).bitwise_or_(halves[::2].int())
    by_panel = words.view(num_pairs, num_panels, PANEL).transpose(0, 1)
    space.view(torch.int32).view(by_panel.shape).copy_(by_panel)
    return space.view(b.dtype).view(*by_panel.shape, 2)


def _padded(b: Tensor) -> Tensor:
    ranks, width = b.shape
    is_whole = ranks % 2 == 0 and width % PANEL == 0
    return b if is_whole else F.pad(b, (0, -width % PANEL, 0, ranks % 2))


def _panels(b: Tensor) -> tuple[int, int]:
    """Return the number of panels of B [r, out], and of pairs of ranks in each."""
    ranks, width = b.shape
    return -(-width // PANEL), -(-ranks // 2)


def _cut(block: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    start = 0
    for size in sizes:
        yield block[start : start + size]
        start += _aligned(size)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
