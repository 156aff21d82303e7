"""Computes what a probe should give: the base's layers, with an adapter's weights in plain torch.

Nothing of how a backend packs, places or batches adapters is used: the factors are multiplied in
float32, as they were read. The base's matrices are those that are served, so that a quantized base
is no reason to differ.
"""

from collections.abc import Generator

import torch
from torch import Tensor

from engine.lora.weights import LoraWeights, SiteWeights
from engine.model.decoder import Decoder
from engine.model.inputs import AttentionInputs, ForwardInputs

# The logprob of each token after the first, by the base and by the adapter: [2, num_tokens - 1]
Expected = list[list[float]]


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
    for r0, r1, out0, out1, b in weights.expands:
        a = weights.a[r0:r1].to(y.device).float()
        wide[:, out0:out1] += x.float() @ a.T @ b.to(y.device).float()
    return wide


@torch.inference_mode()
def expect(
    decoder: Decoder, weights: LoraWeights, token_ids: list[int], start: int | None = 0
) -> Generator[None, None, Expected]:
    """Compute the logprobs of the tokens, by the base and by the adapter, which acts from `start`.

    Yields after every layer, so that the caller can run steps between them.
    """
    spec, build, count = decoder.spec, decoder.build, len(token_ids)
    first = count + (count if start is None else start)
    inputs = _twice(token_ids, ReferenceLora(weights, first), build.device)
    kv_layer = build.empty(2, 2, count, spec.num_kv_heads, spec.head_dim)
    x = decoder.embedding(inputs.token_ids)
    rotations = [table(inputs.positions) for table in decoder.rotary_tables]
    for layer in decoder.layers:
        x = layer(x, inputs, rotations, kv_layer)
        yield
    hidden = decoder.norm(x).view(2, count, -1)[:, :-1]
    return [_logprobs(decoder.logits(rows), token_ids[1:]) for rows in hidden]


def _twice(token_ids: list[int], lora: ReferenceLora, device: torch.device) -> ForwardInputs:
    """Compute all tokens for two requests at once, each in a block of that size."""
    count = len(token_ids)
    attention = AttentionInputs(
        num_decodes=0,
        cu_seqlens_q=[0, count, 2 * count],
        context_lens=[count, count],
        block_tables=torch.tensor([[0], [1]], device=device),
        slot_mapping=torch.arange(2 * count, device=device),
    )
    tokens = torch.tensor(2 * token_ids, device=device)
    positions = torch.arange(count, device=device).repeat(2)
    return ForwardInputs(tokens, positions, attention, lora)


def _logprobs(logits: Tensor, token_ids: list[int]) -> list[float]:
    chosen = torch.tensor(token_ids, device=logits.device)[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
