"""ComputeLayers: what a backend may offer to compute references with, beside its own steps."""

from collections.abc import Generator, Sequence
from typing import Protocol

from torch import Tensor

from engine.lora.weights import LoraWeights


class ComputeLayers(Protocol):
    """All layers of a decoder, for a few tokens at positions from 0 on.

    Nothing of how a backend packs, places or batches adapters may be used.
    """

    def __call__(
        self, token_ids: Sequence[int], copies: int, weights: LoraWeights, first: int
    ) -> Generator[None, None, Tensor] | None:
        """Compute hidden states [copies * N, E] after the last norm, of so many equal requests.

        The rows from `first` on have the adapter. Yields every few milliseconds. None if it cannot
        compute that many, or such an adapter.
        """
        ...
