"""Computes what a probe should give: the base's layers, with an adapter's weights in plain torch.

Nothing of how a backend packs, places or batches adapters is used: the factors are multiplied in
float32, as they were read. The base's layers are those that are served, so that a quantized base
is no reason to differ.
"""

from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.lora.compute_layers import ComputeLayers
from engine.lora.weights import LoraWeights, SiteWeights
from engine.model.decoder import Decoder
from engine.model.inputs import ApplyWeight, AttentionInputs, ForwardInputs

PIECE_ROWS = 4096  # of an output layer that are in float32 at a time


class Expected(NamedTuple):
    """The logprob of each token after the first: num_tokens - 1 of them."""

    adapted: list[float]
    base: list[float] | None = None  # if it was asked for


class ReferenceLora:
    """A LoraBatch of one adapter on the rows from `first` on."""

    def __init__(self, weights: LoraWeights, first: int) -> None:
        self._weights = weights
        self._rows = slice(first, None)

    def add(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        """Set the rows y [N, out] to y * scale + shift + x [N, in] A^T B, rounded once."""
        weights = self._weights.sites.get((layer, site))
        if weights is not None:
            y[self._rows] = _adapted(weights, x[self._rows], y[self._rows]).to(y.dtype)


def _adapted(weights: SiteWeights, x: Tensor, y: Tensor) -> Tensor:
    wide = y.float()
    if weights.scale is not None:
        wide = wide * weights.scale.to(y.device)
    if weights.shift is not None:
        wide = wide + weights.shift.to(y.device)
    if weights.expands:
        inner = x.float() @ weights.a.to(y.device).float().T  # one product for all slices
    for r0, r1, out0, out1, b in weights.expands:
        wide[:, out0:out1].addmm_(inner[:, r0:r1], b.to(y.device).float())
    return wide


class ReferenceOverlays:
    """The Overlays and Heads of one adapter: of the rows from `first` on, one by one."""

    def __init__(self, weights: LoraWeights, first: int) -> None:
        self._weights = weights
        self._first = first

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Look up each token [N] in the base's matrix, or in the adapter's -> [N, E]."""
        x = weight[token_ids.clamp(max=len(weight) - 1)]
        overlay = self._weights.embedding
        if overlay is None:
            return x
        for i in range(self._first, len(token_ids)):
            token_id = int(token_ids[i])
            own = overlay.rows[overlay.ids == token_id]
            wide = (own[0].to(x.device) if len(own) else x[i]).float()
            if overlay.scale is not None:
                wide = wide * overlay.scale.to(x.device)
            if overlay.factors is not None:
                a, b = (f.to(x.device).float() for f in overlay.factors)
                wide = wide + a[token_id] @ b
            x[i] = wide
        return x

    def norm(self, module: str, x: Tensor, weight: Tensor, apply: ApplyWeight) -> Tensor:
        """Normalise x [N, ...], its later rows by the adapter's weight if it has one."""
        own = self._weights.norms.get(module)
        if own is None:
            return apply(x, weight)
        first = self._first
        return torch.cat([apply(x[:first], weight), apply(x[first:], own.to(x.device))])

    @property
    def are_whole(self) -> bool:
        """Always False: what is not needed is computed all the same."""
        return False

    def change(self, hidden: Tensor, logits: Tensor | None) -> Tensor:
        """Return logits [M, V] of the adapter's own output layer."""
        assert logits is not None
        overlay, first = self._weights.head, self._first
        if overlay is None:
            return logits
        more = logits.new_zeros(len(logits), max(0, overlay.vocab_size - logits.shape[1]))
        logits = torch.cat([logits, more], 1)
        wide = hidden[first:].float()
        pieces = zip(overlay.ids.split(PIECE_ROWS), overlay.rows.split(PIECE_ROWS), strict=True)
        for ids, rows in pieces:
            own = rows.to(wide.device).float()
            logits[first:, ids.to(wide.device)] = wide @ own.T
        own = logits[first:, : overlay.vocab_size]
        if overlay.scale is not None:
            own *= overlay.scale.to(wide.device)
        if overlay.shift is not None:
            own += overlay.shift.to(wide.device)
        if overlay.factors is not None:
            a, b = (f.to(wide.device).float() for f in overlay.factors)
            own += wide @ a.T @ b
        return logits

    def forbid(self, logits: Tensor, vocab_size: int) -> None:
        """Take what only the adapter has from rows before it acts, what it lacks from others."""
        logits[: self._first, vocab_size:] = -torch.inf
        if self._weights.head is not None:
            logits[self._first :, self._weights.head.vocab_size :] = -torch.inf


@torch.inference_mode()
def expect(
    decoder: Decoder,
    weights: LoraWeights,
    token_ids: Sequence[int],
    start: int = 0,
    *,
    with_base: bool = False,
    layers: ComputeLayers | None = None,
) -> Generator[None, None, Expected]:
    """Compute the logprobs of the tokens by the adapter, which acts from `start`.

    Also by the base if that is asked for, which takes twice the work. Yields every few layers, so
    that the caller can run steps between them. `layers` are used for what they can compute.
    """
    spec, count = decoder.spec, len(token_ids) - 1  # nothing follows the last one
    num_base = count if with_base else 0
    first = num_base + min(start, count)
    copies = num_base // count + 1
    known = None if layers is None else layers(token_ids[:-1], copies, weights, first)
    hidden = yield from known or _hidden(decoder, token_ids[:-1], copies, weights, first)
    yield  # the output layer is as long as many of the others
    own = None if weights.head is None else ReferenceOverlays(weights, first - num_base)
    adapted = _logprobs(decoder.logits(hidden[num_base:], own), token_ids[1:])
    if not with_base:
        return Expected(adapted)
    # Of a token that the base does not have, it cannot say how much the adapter changes
    in_base = [min(token_id, spec.vocab_size - 1) for token_id in token_ids[1:]]
    base = _logprobs(decoder.logits(hidden[:count]), in_base)
    pairs = zip(token_ids[1:], base, adapted, strict=True)
    return Expected(adapted, [a if i >= spec.vocab_size else b for i, b, a in pairs])


def _hidden(
    decoder: Decoder,
    token_ids: Sequence[int],
    copies: int,
    weights: LoraWeights,
    first: int,
) -> Generator[None, None, Tensor]:
    """Compute what ComputeLayers do by the decoder's modules."""
    spec, count = decoder.spec, len(token_ids)
    lora = ReferenceLora(weights, first) if weights.sites else None
    has_own = weights.changes_rows or weights.head is not None
    overlays = ReferenceOverlays(weights, first) if has_own else None
    inputs = _inputs(token_ids, copies, lora, overlays, decoder.build.device)
    kv_layer = decoder.build.empty(copies, 2, count, spec.num_kv_heads, spec.head_dim)
    x = decoder.embedding(inputs.token_ids, overlays)
    rotations = [table(inputs.positions) for table in decoder.rotary_tables]
    for layer in decoder.layers:
        x = layer(x, inputs, rotations, kv_layer)
        yield
    return decoder.norm(x, overlays)


def _inputs(
    token_ids: Sequence[int],
    copies: int,
    lora: ReferenceLora | None,
    overlays: ReferenceOverlays | None,
    device: torch.device,
) -> ForwardInputs:
    """Compute all tokens for so many requests at once, each in a block of that size."""
    count = len(token_ids)
    attention = AttentionInputs(
        num_decodes=0,
        cu_seqlens_q=[i * count for i in range(copies + 1)],
        context_lens=[count] * copies,
        block_tables=torch.arange(copies, device=device)[:, None],
        slot_mapping=torch.arange(copies * count, device=device),
    )
    tokens = torch.tensor([*token_ids] * copies, device=device)
    positions = torch.arange(count, device=device).repeat(copies)
    return ForwardInputs(tokens, positions, attention, lora, overlays)


def _logprobs(logits: Tensor, token_ids: Sequence[int]) -> list[float]:
    chosen = torch.tensor([*token_ids], device=logits.device)[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
