"""Packs adapters for the native kernels, with B in panels of columns.

Columns that are scaled or shifted without factors have a B of rank 0. Large adapters have their own
huge pages, in the order in which a step reads.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.backends.native.memory import ALIGNMENT, separate_bytes
from engine.backends.native.overlays import Embedding, Head, pack_embedding, pack_head
from engine.backends.native.panel_layout import LARGE, PANEL, in_panels, panel_bytes
from engine.lora.weights import Expand, LoraWeights, Sites, SiteWeights


@dataclass(frozen=True, slots=True)
class PanelWeights:
    """One adapter, each B as [ceil(out / 32), ceil(r / 2), 32, 2]; ValueError for other shapes."""

    digest: str
    sites: Sites
    nbytes: int  # in memory, padding included
    norms: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])  # [width] in float32
    embedding: Embedding | None = None
    head: Head | None = None

    def __post_init__(self) -> None:
        for *_, b in (expand for site in self.sites.values() for expand in site.expands):
            if b.dim() != 4 or b.shape[2:] != (PANEL, 2):
                raise ValueError(
                    f"adapter {self.digest}: B {tuple(b.shape)}; only panels are allowed"
                )


def pack_adapter(weights: LoraWeights) -> PanelWeights:
    """Pack factors of 2 bytes; called in the host cache's threads. The weights are not kept."""
    sites, nbytes = _pack_sites(weights.sites)
    norms = {name: norm.float().contiguous() for name, norm in weights.norms.items()}
    digest, embedding, head = weights.digest, weights.embedding, weights.head
    packed_embedding = None if embedding is None else pack_embedding(digest, embedding)
    packed_head = None if head is None else pack_head(digest, head)
    nbytes += sum(norm.nbytes for norm in norms.values())
    nbytes += sum(o.nbytes for o in (packed_embedding, packed_head) if o is not None)
    return PanelWeights(digest, sites, nbytes, norms, packed_embedding, packed_head)


def _pack_sites(sites: Sites) -> tuple[Sites, int]:
    """Pack all sites; return their bytes too."""
    sizes = [size for site in sites.values() for size in _sizes(site)]
    nbytes = sum(sizes)
    if nbytes < LARGE:
        spaces = (torch.empty(size, dtype=torch.uint8) for size in sizes)
    else:
        block = separate_bytes(sum(map(_aligned, sizes)))
        nbytes, spaces = block.nbytes, _cut(block, sizes)
    return {key: _packed(site, spaces) for key, site in sites.items()}, nbytes


def _sizes(site: SiteWeights) -> Iterator[int]:
    """Yield the bytes of A, of each packed B, and of scale and shift."""
    yield site.a.nbytes
    for *_, b in site.expands:
        yield panel_bytes(b)
    yield from (affine.nbytes for affine in (site.scale, site.shift) if affine is not None)


def _packed(site: SiteWeights, spaces: Iterator[Tensor]) -> SiteWeights:
    a = next(spaces).view(site.a.dtype).view(site.a.shape).copy_(site.a)
    expands = [(*e[:4], in_panels(e[4], next(spaces))) for e in site.expands]
    scale, shift = (
        None if affine is None else next(spaces).view(torch.float32).copy_(affine)
        for affine in (site.scale, site.shift)
    )
    return SiteWeights(a, (*expands, *_without_factors(site)), scale, shift)


def _without_factors(site: SiteWeights) -> Iterator[Expand]:
    """Yield the columns between those of the factors, from the first to the last changed one."""
    affine = site.shift if site.scale is None else site.scale
    if affine is None:
        return
    changed = torch.zeros(len(affine), dtype=torch.bool)
    if site.scale is not None:
        changed |= site.scale != 1
    if site.shift is not None:
        changed |= site.shift != 0
    start, rank, end = 0, len(site.a), len(changed)
    spans = sorted((out0, out1) for _, _, out0, out1, _ in site.expands)
    for out0, out1 in [*spans, (end, end)]:
        columns = (changed[start:out0].nonzero().view(-1) + start).tolist()
        if columns:
            first, last = columns[0], columns[-1] + 1
            b = torch.empty(-(-(last - first) // PANEL), 0, PANEL, 2, dtype=site.a.dtype)
            yield rank, rank, first, last, b
        start = out1


def _cut(block: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    start = 0
    for size in sizes:
        yield block[start : start + size]
        start += _aligned(size)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
