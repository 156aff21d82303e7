"""Applies what adapters change beside linear layers: embedding, norms and output layer.

Rows of a batch are grouped by adapter, so that the work grows with the adapters, not the requests.
A batch none of whose adapters has such a change is given None and pays nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.lora.overlay import Overlay
from engine.lora.weights import LoraWeights
from engine.model.inputs import ApplyWeight

Rows = tuple[Tensor, LoraWeights]  # numbers of rows, int64, and their adapter


def group_rows(
    slots: Iterable[int], weights: Mapping[int, LoraWeights], device: torch.device
) -> list[Rows]:
    """Group rows by the slot of their adapter; rows without an adapter are left out."""
    by_slot: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot:
            by_slot.setdefault(slot, []).append(row)
    return [(torch.tensor(rows, device=device), weights[s]) for s, rows in by_slot.items()]


@dataclass(frozen=True, slots=True)
class MixedOverlays:
    """Implements Overlays of a decoder's inputs, for rows of one batch."""

    rows: Sequence[Rows]

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Look up each row's token in its own matrix: token_ids [N] -> [N, E]."""
        x = F.embedding(token_ids.clamp(max=len(weight) - 1), weight)
        for rows, adapter in self.rows:
            if adapter.embedding is not None:
                x[rows] = _embed(adapter.embedding, token_ids[rows], x[rows])
        return x

    def norm(self, module: str, x: Tensor, weight: Tensor, apply: ApplyWeight) -> Tensor:
        """Normalise x [N, ...], rows of adapters that replace this norm by their own weight."""
        y = apply(x, weight)
        for rows, adapter in self.rows:
            own = adapter.norms.get(module)
            if own is not None:
                y[rows] = apply(x[rows], own)
        return y


def _embed(overlay: Overlay, token_ids: Tensor, x: Tensor) -> Tensor:
    if len(overlay.ids):
        at = torch.searchsorted(overlay.ids, token_ids).clamp(max=len(overlay.ids) - 1)
        is_changed = overlay.ids[at] == token_ids
        x = torch.where(is_changed[:, None], overlay.rows[at], x)
    if overlay.scale is not None:
        x = (x.float() * overlay.scale).to(x.dtype)
    if overlay.factors is not None:
        a, b = overlay.factors
        x = torch.addmm(x, a[token_ids], b)
    return x


@dataclass(frozen=True, slots=True)
class MixedHeads:
    """The output layers of some rows [M], which may have more token ids than the base."""

    rows: Sequence[Rows]
    num_rows: int

    @property
    def are_whole(self) -> bool:
        """Whether nothing of the base's output layer is needed: a batch of replaced ones alone."""
        own = [(rows, a.head) for rows, a in self.rows if a.head is not None and a.head.is_whole]
        return sum(len(rows) for rows, _ in own) == self.num_rows

    def change(self, hidden: Tensor, logits: Tensor | None) -> Tensor:
        """Change logits [M, V] float32 in place, or return wider ones; None if they are whole."""
        width = max(_width(adapter) for _, adapter in self.rows)
        if logits is None:
            logits = hidden.new_zeros(len(hidden), width, dtype=torch.float32)
        elif width > logits.shape[1]:
            logits = F.pad(logits, (0, width - logits.shape[1]))
        for rows, adapter in self.rows:
            if adapter.head is not None:
                logits[rows] = _head(adapter.head, hidden[rows], logits[rows])
        return logits

    def forbid(self, logits: Tensor, vocab_size: int) -> None:
        """Set logits of ids that a row's adapter does not have to -inf."""
        own = [(rows, a.head.vocab_size) for rows, a in self.rows if a.head is not None]
        if logits.shape[1] == vocab_size and all(size == vocab_size for _, size in own):
            return
        ends = torch.full((self.num_rows, 1), vocab_size, device=logits.device)
        for rows, size in own:
            ends[rows] = size
        logits.masked_fill_(torch.arange(logits.shape[1], device=logits.device) >= ends, -torch.inf)


def _width(adapter: LoraWeights) -> int:
    return 0 if adapter.head is None else adapter.head.vocab_size


def _head(overlay: Overlay, hidden: Tensor, logits: Tensor) -> Tensor:
    if len(overlay.ids):
        logits[:, overlay.ids] = (hidden @ overlay.rows.T).float()
    own = logits[:, : overlay.vocab_size]
    if overlay.scale is not None:
        own *= overlay.scale
    if overlay.shift is not None:
        own += overlay.shift
    if overlay.factors is not None:
        a, b = overlay.factors
        own += ((hidden @ a.T) @ b).float()
    return logits
