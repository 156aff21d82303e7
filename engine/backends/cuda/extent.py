"""Packs an adapter into an extent: one piece of memory, which is copied and moved as a whole.

    [ A of the first site | B of its first slice | of its second | ... | scale | shift |
      A of the next site | ... | norms | ids, rows, factors and scale of the embedding |
      ids and rows of the head ]

A is [R, in], with the ranks of the site's slices one after another; B of a slice is rank-major
[r, out_j] and includes the scaling. No rank is padded: rows of both are as wide as the layer, so
that wide loads are possible at any rank. Scale and shift are float32 [out] of the whole site, where
the adapter has them. Norms are float32, ids int64. Every piece starts at a multiple of UNIT_BYTES.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.lora.overlay import Overlay
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
    out_features: int | None = None  # of scale and shift
    scale_bytes: int | None = None  # None: it has none
    shift_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class NormExtent:
    weight_bytes: int
    width: int


@dataclass(frozen=True, slots=True)
class OverlayExtent:
    """Changed rows of a matrix, and its factors A [.., r] and B [r, E] if lora_rank is not 0."""

    num_ids: int
    ids_bytes: int
    rows_bytes: int
    lora_rank: int
    a_bytes: int
    b_bytes: int
    vocab_size: int
    hidden_size: int
    scale_bytes: int | None = None  # of an embedding, float32 [E]; None: it has none


@dataclass(frozen=True, slots=True)
class AdapterExtent:
    """The layout of an adapter, in bytes from the start of its extent."""

    digest: str
    dtype: torch.dtype | None  # of factors and rows; None: there are none
    sites: dict[Site, SiteExtent]
    nbytes: int  # a multiple of UNIT_BYTES
    norms: dict[str, NormExtent] = field(default_factory=dict[str, NormExtent])
    embedding: OverlayExtent | None = None
    head: OverlayExtent | None = None


def extent_of(weights: LoraWeights) -> AdapterExtent:
    """Lay out the sites in the order of `weights`. Raises ValueError if a B is not [r, out].

    Factors of the output layer must be those of a site (`head.with_head_site`).
    """
    return _lay_out(weights, _Pieces())


def extent_nbytes(weights: LoraWeights) -> int:
    """Return the number of bytes that `pack_extent` writes."""
    return extent_of(weights).nbytes


def pack_extent(weights: LoraWeights, buffer: Tensor) -> AdapterExtent:
    """Write the extent to the start of `buffer`, uint8 [>= nbytes] on any device; gaps are kept.

    The buffer's address must be a multiple of 16.
    """
    pieces = _Pieces()
    extent = _lay_out(weights, pieces)
    if buffer.dtype != torch.uint8 or buffer.ndim != 1 or buffer.numel() < extent.nbytes:
        raise ValueError(
            f"adapter {weights.digest}: a buffer {buffer.dtype} {list(buffer.shape)}; "
            f"only uint8 [>= {extent.nbytes}] is allowed"
        )
    for start, piece in pieces.placed:
        buffer[start : start + piece.nbytes].view(piece.dtype).view(piece.shape).copy_(piece)
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


class _Pieces:
    """Tensors one after another, each with its first byte."""

    def __init__(self) -> None:
        self.placed: list[tuple[int, Tensor]] = []
        self.nbytes = 0

    def put(self, piece: Tensor) -> int:
        start = self.nbytes
        self.placed.append((start, piece))
        self.nbytes += -(-piece.nbytes // UNIT_BYTES) * UNIT_BYTES
        return start


def _lay_out(weights: LoraWeights, pieces: _Pieces) -> AdapterExtent:
    assert weights.head is None or weights.head.factors is None
    sites: dict[Site, SiteExtent] = {}
    for key, site in weights.sites.items():
        _check_site(weights.digest, site)
        sites[key] = _lay_out_site(site, pieces)
    norms = {
        name: NormExtent(pieces.put(norm.float()), len(norm))
        for name, norm in weights.norms.items()
    }
    embedding = None if weights.embedding is None else _lay_out_overlay(weights.embedding, pieces)
    head = None if weights.head is None else _lay_out_overlay(weights.head, pieces)
    dtype = _dtype_of(weights)
    return AdapterExtent(weights.digest, dtype, sites, pieces.nbytes, norms, embedding, head)


def _dtype_of(weights: LoraWeights) -> torch.dtype | None:
    dtypes = {site.a.dtype for site in weights.sites.values()}
    dtypes |= {b.dtype for site in weights.sites.values() for *_, b in site.expands}
    for overlay in (weights.embedding, weights.head):
        if overlay is not None:
            dtypes |= {overlay.rows.dtype, *(factor.dtype for factor in overlay.factors or ())}
    if len(dtypes) > 1 or not (dtypes or weights.norms):
        raise ValueError(
            f"adapter {weights.digest}: factors are {sorted(map(str, dtypes)) or 'missing'}; "
            "only factors of one dtype are allowed"
        )
    return next(iter(dtypes), None)


def _lay_out_overlay(overlay: Overlay, pieces: _Pieces) -> OverlayExtent:
    a_bytes = b_bytes = lora_rank = 0
    ids_bytes, rows_bytes = pieces.put(overlay.ids), pieces.put(overlay.rows)
    if overlay.factors is not None:
        a, b = overlay.factors
        a_bytes, b_bytes, lora_rank = pieces.put(a), pieces.put(b), len(b)
    return OverlayExtent(
        num_ids=len(overlay.ids),
        ids_bytes=ids_bytes,
        rows_bytes=rows_bytes,
        lora_rank=lora_rank,
        a_bytes=a_bytes,
        b_bytes=b_bytes,
        vocab_size=overlay.vocab_size,
        hidden_size=overlay.rows.shape[1],
        scale_bytes=None if overlay.scale is None else pieces.put(overlay.scale),
    )


def _lay_out_site(site: SiteWeights, pieces: _Pieces) -> SiteExtent:
    a_bytes = pieces.put(site.a)
    slices = tuple(
        SliceExtent(r0, r1, out0, out1, pieces.put(b)) for r0, r1, out0, out1, b in site.expands
    )
    affine = [piece for piece in (site.scale, site.shift) if piece is not None]
    return SiteExtent(
        a_bytes=a_bytes,
        lora_rank=site.a.shape[0],
        in_features=site.a.shape[1],
        slices=slices,
        out_features=len(affine[0]) if affine else None,
        scale_bytes=None if site.scale is None else pieces.put(site.scale),
        shift_bytes=None if site.shift is None else pieces.put(site.shift),
    )


def _check_site(digest: str, site: SiteWeights) -> None:
    for r0, r1, out0, out1, b in site.expands:
        if b.shape != (r1 - r0, out1 - out0):
            raise ValueError(
                f"adapter {digest}: B {tuple(b.shape)}; only rank-major "
                f"{(r1 - r0, out1 - out0)} is allowed"
            )
    affine = [piece for piece in (site.scale, site.shift) if piece is not None]
    if len({piece.shape for piece in affine}) > 1 or any(p.dtype != torch.float32 for p in affine):
        found = ", ".join(f"{piece.dtype} {list(piece.shape)}" for piece in affine)
        raise ValueError(
            f"adapter {digest}: scale and shift are {found}; only float32 of one size is allowed"
        )
