"""OverlayKernels: computes what adapters change of the embedding and of the output layer.

Runs only in steps that have such an adapter. Each row's bits depend on that row alone: rows are
copied, and multiplied by the same kernels as all other layers.
"""

import ctypes as c
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.library import Context
from engine.backends.native.memory import temporary_bytes
from engine.backends.native.overlays import Embedding, Head
from engine.backends.native.site_table import NativeLoraBatch

Rows = list[int]


class OverlayKernels:
    """Runs on the threads of `context`."""

    def __init__(self, context: Context) -> None:
        self._linear = context.function("linear", structs.ReefLinearArgs)
        self._lora = context.function("lora", structs.ReefLoraArgs)
        self._expand = context.function("lora_expand", structs.ReefLoraArgs)

    # ==== embedding ====

    def embed(
        self,
        changes: Sequence[tuple[Embedding, Rows]],
        token_ids: Tensor,
        x: Tensor,
        scale: float,
    ) -> None:
        """Change rows of x [N, E], which are those of token_ids [N] in the base, times `scale`."""
        for embedding, rows in changes:
            at = torch.tensor(rows)
            _replace(embedding, token_ids[at], at, x, scale)
        factors = [(e.a, e.b, rows) for e, rows in changes if e.a is not None and e.b is not None]
        if factors:
            batch = NativeLoraBatch.make([(b, rows) for _, b, rows in factors])
            h = _room(batch)
            start = 0
            for a, _, rows in factors:
                picked = a.index_select(0, token_ids[torch.tensor(rows)])
                h[start : start + len(rows), : a.shape[1]] = picked * scale
                start += len(rows)
            self._expand(_lora_args(batch, x, x, h))

    # ==== output layer ====

    def head(self, changes: Sequence[tuple[Head, Rows]], hidden: Tensor, logits: Tensor) -> None:
        """Change rows of logits [M, V], float32: those that the base's layer makes of hidden
        [M, E]. V is at least each adapter's own number of ids."""
        for head, rows in changes:
            if head.rows is not None:
                self._replace_logits(head, rows, hidden, logits)
        factors = [(head.factors, rows) for head, rows in changes if head.factors is not None]
        if factors:
            batch = NativeLoraBatch.make(factors)
            h = _room(batch)  # lives as long as the call
            self._lora(_lora_args(batch, hidden, logits, h))

    def _replace_logits(self, head: Head, rows: Rows, hidden: Tensor, logits: Tensor) -> None:
        linear, count = head.rows, len(rows)
        assert linear is not None
        x, own = hidden[torch.tensor(rows)], torch.empty(count, len(head.ids))
        scratch = temporary_bytes(linear.scratch_bytes(count))  # lives as long as the call
        self._linear(linear.args(x, own, scratch))
        for row, values in zip(rows, own, strict=True):
            logits[row].index_copy_(0, head.ids, values)


def hide_absent_ids(
    logits: Tensor, changes: Sequence[tuple[Head, Rows]], base_vocab_size: int
) -> None:
    """Set to -inf, in each row of logits [M, V], the ids that its adapter, or the base, lacks."""
    sizes = [base_vocab_size] * len(logits)
    for head, rows in changes:
        for row in rows:
            sizes[row] = head.vocab_size
    for row, size in enumerate(sizes):
        if size < logits.shape[1]:
            logits[row, size:] = -torch.inf


def _replace(embedding: Embedding, token_ids: Tensor, at: Tensor, x: Tensor, scale: float) -> None:
    """Write the rows that the adapter has of these ids to rows `at` of x."""
    if not len(embedding.ids):
        return
    places = torch.searchsorted(embedding.ids, token_ids).clamp_max_(len(embedding.ids) - 1)
    is_own = embedding.ids[places] == token_ids
    x[at[is_own]] = embedding.rows[places[is_own]] * scale


def _room(batch: NativeLoraBatch) -> Tensor:
    rank = batch.struct.max_lora_rank
    return torch.empty(len(batch.rows), rank + rank % 2, dtype=torch.bfloat16)


def _lora_args(batch: NativeLoraBatch, x: Tensor, y: Tensor, h: Tensor) -> structs.ReefLoraArgs:
    return structs.ReefLoraArgs(
        batch=c.pointer(batch.struct),
        site=0,
        in_features=x.shape[1],
        x=x.data_ptr(),
        x_stride=x.stride(0),
        y=y.data_ptr(),
        y_stride=y.stride(0),
        h=h.data_ptr(),
        h_stride=h.stride(0),
        y_is_float=y.dtype == torch.float32,
    )
