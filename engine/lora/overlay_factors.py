"""Loads LoRA on the embedding and on the output layer, with DoRA and the bias behind B.

The output layer is a linear layer whose outputs are the ids. To PEFT the embedding is one whose
inputs are the ids: its A has a column for each, and DoRA's norms are those of the matrix's columns,
so that its scale is [E] and depends on all ids.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from adapter_store.layout import LoraModule
from engine.lora.affine import dora_scale
from engine.lora.overlay import Overlay
from engine.lora.source import Source
from engine.lora.weights import AdapterLoadError


def with_factors(
    overlay: Overlay,
    module: LoraModule,
    name: str,
    of_embedding: bool,
    matrix: Iterable[Tensor],
    source: Source,
) -> Overlay:
    """Add factors, scale and shift to an overlay. Raises AdapterLoadError.

    `matrix` yields the rows [n, E] that the factors are added to; only DoRA reads them.
    """
    rank, width, vocab_size = module.lora_rank, source.base.spec.hidden_size, overlay.vocab_size
    inner, outer = (vocab_size, width) if of_embedding else (width, vocab_size)
    a = source.tensor(module.lora_a, (rank, inner), name)
    b = source.tensor(module.lora_b, (outer, rank), name).float()
    scaled, scale, shift = b * module.scaling, None, None
    if module.magnitude is not None:
        magnitude = source.tensor(module.magnitude, (outer,), name).float()
        of_matrix = _column_scale if of_embedding else dora_scale
        scale = of_matrix(matrix, a, b, module.scaling, magnitude)
        scaled *= scale[:, None]
        check_finite(f"{name}: DoRA's scale", scale)
    if module.lora_b_bias is not None:
        shift = source.tensor(module.lora_b_bias, (outer,), name).float() * module.scaling
    a, scaled = a.to(source.dtype), scaled.to(source.dtype).T.contiguous()
    check_finite(name, scaled)
    factors = (a.T.contiguous() if of_embedding else a), scaled
    return replace(overlay, factors=factors, scale=scale, shift=shift)


def _column_scale(
    matrix: Iterable[Tensor], a: Tensor, b: Tensor, scaling: float, magnitude: Tensor
) -> Tensor:
    """Compute magnitude / ||W + scaling A^T B^T|| of each column: A [r, V], B [E, r], W [V, E]."""
    a, b = a.float(), b.float()
    squares = torch.zeros(len(b), dtype=torch.float64)
    start = 0
    for rows in matrix:
        changed = torch.addmm(rows, a[:, start : start + len(rows)].T, b.T, alpha=scaling)
        squares += changed.square().sum(0, dtype=torch.float64)
        start += len(rows)
    return magnitude / squares.sqrt().float()


def check_finite(what: str, values: Tensor) -> None:
    """Raise AdapterLoadError for an infinity or a NaN."""
    if values.numel() and not values.abs().max().isfinite():
        raise AdapterLoadError(f"{what}: the adapter's values are not finite in {values.dtype}")
