"""Overlay: what an adapter changes of the embedding matrix, or of the output layer.

Both are a matrix [V, E] with a row for each token id. Rows that an adapter leaves as the base has
them are not part of it, so that it costs what it changes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Overlay:
    """Rows `ids` become `rows`; what is computed with them is scaled and shifted; then the factors,
    if any, add their part.

    Factors have the form that makes both uses cheap. Of the embedding they are A [V', r], a row for
    each id, and B [r, E]: the vector of an id is its row * scale + A[id] B. Of the output layer
    they are A [r, E] and B [r, V'], as of any linear layer: the logits are those of the rows *
    scale + shift + (h A^T) B. B includes the scaling. `vocab_size` V' is the number of rows of the
    adapter's own matrix; ids from the base's number on are valid for this adapter alone, and `ids`
    lists each of them.
    """

    ids: Tensor  # [K] int64, ascending, each once
    rows: Tensor  # [K, E]
    factors: tuple[Tensor, Tensor] | None
    vocab_size: int
    scale: Tensor | None = None  # float32 [E] of the embedding, [V'] of the output layer; None: 1
    shift: Tensor | None = None  # float32 [V'] of the output layer; None: 0

    def to(self, device: torch.device) -> "Overlay":
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        factors = self.factors
        if factors is not None:
            a, b = factors
            factors = a.to(device, non_blocking=True), b.to(device, non_blocking=True)
        return replace(
            self,
            ids=self.ids.to(device, non_blocking=True),
            rows=self.rows.to(device, non_blocking=True),
            factors=factors,
            scale=moved(self.scale),
            shift=moved(self.shift),
        )

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left of the base's matrix."""
        return len(self.ids) == self.vocab_size

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        others = [*(self.factors or ()), self.scale, self.shift]
        return self.ids.nbytes + self.rows.nbytes + sum(t.nbytes for t in others if t is not None)
