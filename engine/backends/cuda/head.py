"""Output layers of adapters: rows and factors of their own, and ids that the base does not have.

Logits are computed outside of graphs, so a batch without such adapters has none of this work.
Factors are those of one more site, computed by the kernels of all sites; rows are multiplied
adapter by adapter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.cuda.extent import AdapterExtent, OverlayExtent
from engine.backends.cuda.places import HEAD
from engine.backends.cuda.weight_ops import DenseHead
from engine.lora.weights import AdapterLoadError, LoraWeights, SiteWeights
from engine.model.inputs import LoraBatch
from engine.model.layers import Head

WIDTH_STEP = 16  # widths are multiples of it, for which kernels of sampling are compiled


def with_head_site(weights: LoraWeights, vocab_size: int) -> LoraWeights:
    """Make the output layer's factors, scale and shift those of a site; of rows beyond the base's,
    add them up.

    Raises AdapterLoadError for a shift of such rows, which have no place for it.
    """
    head = weights.head
    if head is None or head.factors is None:
        return weights
    a, b = head.factors
    rows, is_new = head.rows.clone(), head.ids >= vocab_size
    new_ids = head.ids[is_new]
    if head.shift is not None and len(new_ids):
        raise AdapterLoadError(
            f"adapter {weights.digest} has lora_bias on the output layer and more token ids than "
            "the base, which the Triton kernels do not compute together; kernels='torch' does"
        )
    own = rows[is_new].float()
    if head.scale is not None:
        own *= head.scale[new_ids, None]
    rows[is_new] = (own + b[:, new_ids].float().T @ a.float()).to(rows.dtype)

    def of_base(values: Tensor, neutral: float = 0.0) -> Tensor:
        more = max(0, vocab_size - head.vocab_size)
        return F.pad(values[..., :vocab_size], (0, more), value=neutral).contiguous()

    scale = None if head.scale is None else of_base(head.scale, 1.0)
    shift = None if head.shift is None else of_base(head.shift)
    site = SiteWeights(a, ((0, len(a), 0, vocab_size, of_base(b)),), scale, shift)
    return replace(
        weights,
        sites={**weights.sites, HEAD: site},
        head=replace(head, rows=rows, factors=None, scale=None, shift=None),
    )


@dataclass(frozen=True, slots=True)
class _OwnRows:
    """One adapter's rows of the matrix, for its rows of the batch."""

    rows: Tensor  # [m] int64
    ids: Tensor  # [K] int64
    weight: Tensor  # [K, E]


@dataclass(frozen=True, slots=True)
class HeadBatch:
    """What the adapters of a batch change of its logits."""

    lora: LoraBatch | None  # None: none has factors
    changes: tuple[_OwnRows, ...]
    vocab_size: int  # V, the base's
    widths: Tensor | None  # [M] int32, ids of each row; None: those of the base
    min_width: int
    max_width: int
    is_whole: bool  # nothing of the base's output layer is left in any row

    def logits(self, hidden: Tensor, head: Head) -> Tensor:
        """Compute logits [M, >= V, >= max_width] in float32; -inf where a row has no such id."""
        vocab_size = self.vocab_size
        if self.is_whole:
            logits = hidden.new_zeros(len(hidden), vocab_size, dtype=torch.float32)
        else:
            logits = head.multiply(hidden)
        if self.max_width > vocab_size:
            more = -(-self.max_width // WIDTH_STEP) * WIDTH_STEP - vocab_size
            logits = torch.cat([logits, logits.new_zeros(len(logits), more)], 1)
        for own in self.changes:
            found = DenseHead(own.weight)(hidden.index_select(0, own.rows))
            logits.index_put_((own.rows[:, None], own.ids[None]), found)
        if self.lora is not None:
            self.lora.add(*HEAD, hidden, logits[:, :vocab_size])
        logits = head.finish(logits)
        if self.widths is not None:
            ids = torch.arange(self.min_width, logits.shape[1], device=logits.device)
            logits[:, self.min_width :].masked_fill_(ids >= self.widths[:, None], -torch.inf)
        return logits


def head_batch(
    row_slots: NDArray[np.int32],
    adapters: Mapping[int, tuple[AdapterExtent, int]],
    arena: Tensor,
    vocab_size: int,
    lora: LoraBatch | None,
) -> HeadBatch | None:
    """Make the HeadBatch of rows with these slots; None if their adapters change nothing.

    `adapters` by slot: each one's extent, and its first byte in `arena`. `lora`: the batch of
    these rows if an adapter has factors.
    """
    changes: list[_OwnRows] = []
    num_whole, widths = 0, np.full(row_slots.size, vocab_size, np.int32)
    for slot in np.unique(row_slots[row_slots > 0]).tolist():
        extent, start = adapters[slot]
        if extent.head is None:
            continue
        widths[row_slots == slot] = extent.head.vocab_size
        if extent.head.num_ids:
            rows = to_device(np.flatnonzero(row_slots == slot), arena.device)
            num_whole += len(rows) * (extent.head.num_ids == extent.head.vocab_size)
            changes.append(_OwnRows(rows, *_views(arena[start:], extent.head, extent.dtype)))
    differs = bool((widths != vocab_size).any())
    if lora is None and not changes and not differs:
        return None
    own_widths = to_device(widths, arena.device) if differs else None
    return HeadBatch(
        lora,
        tuple(changes),
        vocab_size,
        own_widths,
        int(widths.min()),
        int(widths.max()),
        is_whole=num_whole == row_slots.size,
    )


def _views(
    memory: Tensor, overlay: OverlayExtent, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the overlay's ids and rows, in an extent's memory."""
    assert dtype is not None
    ids = memory[overlay.ids_bytes :][: 8 * overlay.num_ids].view(torch.int64)
    size = overlay.num_ids * overlay.hidden_size * dtype.itemsize
    rows = memory[overlay.rows_bytes :][:size].view(dtype)
    return ids, rows.view(overlay.num_ids, overlay.hidden_size)


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy values through memory that torch's allocator keeps until the stream has read it."""
    source = torch.from_numpy(values)
    if device.type == "cpu":
        return source
    return source.pin_memory().to(device, non_blocking=True)
