"""Packs what an adapter changes of the embedding and of the output layer, for the native kernels.

Rows of the embedding stay as they are, to be copied. Those of the output layer are packed like any
linear layer's, and B of either's factors like that of any site.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.backends.native.library import Context
from engine.backends.native.linear import NativeLinear
from engine.backends.native.panel_layout import in_panels
from engine.backends.native.site_table import SiteTable
from engine.lora.overlay import Overlay
from engine.lora.weights import SiteWeights


@dataclass(frozen=True, slots=True)
class Embedding:
    """Replaces the vectors of `ids` by `rows`; then makes of all vectors x * scale + A[id] B."""

    ids: Tensor  # [K] int64, ascending
    rows: Tensor  # [K, E]
    a: Tensor | None  # [V', r]
    b: SiteTable | None  # of one site, from r to E, with the scale; present if `a` is
    nbytes: int


@dataclass(frozen=True, slots=True)
class Head:
    """Replaces the logits of `ids` by those of `rows`; then scales and shifts all V' logits, and
    adds the factors'."""

    ids: Tensor  # [K] int64, ascending
    rows: NativeLinear | None  # from E to K; None if K is 0
    factors: SiteTable | None  # of one site, from E to V'
    vocab_size: int  # V': ids from there on are none of this adapter's
    nbytes: int

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left of the base's output layer."""
        return len(self.ids) == self.vocab_size


def pack_embedding(digest: str, overlay: Overlay) -> Embedding:
    """Pack an overlay of the embedding. Raises ValueError unless it is in bfloat16."""
    _check(digest, "embedding", overlay)
    ids, rows = overlay.ids.contiguous(), overlay.rows.contiguous()
    if overlay.factors is None:
        return Embedding(ids, rows, None, None, ids.nbytes + rows.nbytes)
    a, b = overlay.factors
    rank, width = b.shape
    panels = in_panels(b)
    no_a = b.new_empty(rank, 0)  # rows of A are picked, not multiplied
    site = SiteWeights(no_a, ((0, rank, 0, width, panels),), overlay.scale)
    nbytes = ids.nbytes + rows.nbytes + a.nbytes + site.nbytes
    return Embedding(ids, rows, a.contiguous(), SiteTable(digest, [site]), nbytes)


def pack_head(digest: str, overlay: Overlay) -> Head:
    """Pack an overlay of the output layer, in any thread. Raises ValueError unless it is in
    bfloat16."""
    _check(digest, "output layer", overlay)
    ids, rows, factors = overlay.ids.contiguous(), None, None
    nbytes = ids.nbytes
    if len(ids):  # with a thread of its own, since the engine's context is that of its step loop
        rows = NativeLinear(Context(threads=1), overlay.rows)
        nbytes += rows.nbytes
    if overlay.factors is not None:
        a, b = overlay.factors
        rank, width = b.shape
        expands = ((0, rank, 0, width, in_panels(b)),)
        site = SiteWeights(a.contiguous(), expands, overlay.scale, overlay.shift)
        factors = SiteTable(digest, [site])
        nbytes += site.nbytes
    return Head(ids, rows, factors, overlay.vocab_size, nbytes)


def _check(digest: str, what: str, overlay: Overlay) -> None:
    for tensor in (overlay.rows, *(overlay.factors or ())):
        if tensor.dtype != torch.bfloat16:
            raise ValueError(
                f"adapter {digest}: the {what} is {tensor.dtype}; only bfloat16 is allowed"
            )
