"""ForwardInputs: the inputs of one forward pass besides weights and KV cache.

Built by `engine.backends.torch.inputs` and read by the decoder and its ops, never changed.
Rows are ordered: all requests with one new token (decode) first, then the prefill chunks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

ApplyWeight = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [N, ...] and a weight


class LoraBatch(Protocol):
    """The adapters of one batch, ready to be added to any linear layer's output."""

    def add(self, layer: int, site: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add each row's adapter in place: y [N, out] += scaling * (x [N, in] @ A^T) @ B^T."""
        ...


class LoraBatchInParts(LoraBatch, Protocol):
    """A LoraBatch whose `add` can be made in two calls, of which the first needs no y."""

    def shrink(self, layer: int, site: str, x: torch.Tensor) -> None: ...

    def expand(self, layer: int, site: str, y: torch.Tensor) -> None:
        """Complete the site's `shrink`; must precede that of any other site."""
        ...


class Overlays(Protocol):
    """What the adapters of one batch change of the embedding and of norms."""

    def embed(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Look up each row's token in its adapter's matrix: token_ids [N] -> [N, E]."""
        ...

    def norm(
        self, module: str, x: torch.Tensor, weight: torch.Tensor, apply: ApplyWeight
    ) -> torch.Tensor:
        """Normalise x [N, ...] by `apply`, each row with its adapter's weight or with this one."""
        ...


class Heads(Protocol):
    """What the adapters of some rows change of the output layer."""

    @property
    def are_whole(self) -> bool:
        """Whether all rows have output layers of their own, with nothing of the base's."""
        ...

    def change(self, hidden: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """Change the base's logits [M, V] in place, or return wider ones [M, V']. None if they are
        whole."""
        ...

    def forbid(self, logits: torch.Tensor, vocab_size: int) -> None:
        """Set the logits of token ids that a row's adapter does not have to -inf."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Places of each request's queries and keys.

    B requests, N = sum of query lengths. For request i, query rows are
    [cu_seqlens_q[i], cu_seqlens_q[i + 1]) and keys are positions [0, context_lens[i]), the last
    query being at position context_lens[i] - 1.
    """

    num_decodes: int  # the first requests, with one query each
    cu_seqlens_q: list[int]  # [B + 1], on the host
    context_lens: list[int]  # [B], on the host; includes this step's tokens
    block_tables: torch.Tensor  # [B, max_blocks] int64, zero-padded
    slot_mapping: torch.Tensor  # [N] int64: block * block_size + offset


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    token_ids: torch.Tensor  # [N] int64
    positions: torch.Tensor  # [N] int64
    attention: AttentionInputs
    lora: LoraBatch | None  # None: no row has an adapter, and there is no LoRA cost
    overlays: Overlays | None = None  # None: no row's adapter changes the embedding or a norm
