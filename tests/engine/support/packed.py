"""Packs weights as GPTQ's and AWQ's formats define it, nibble by nibble, rounded to nearest."""

from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes with weight[o, i] = (codes[o, i] - zeros[o, groups[i]]) * scales[o, groups[i]]."""

    codes: torch.Tensor  # int64 [out, in]
    zeros: torch.Tensor  # int64 [out, G]
    scales: torch.Tensor  # float16 [out, G]
    groups: torch.Tensor  # int64 [in]

    @property
    def weight(self) -> torch.Tensor:
        zeros, scales = self.zeros[:, self.groups], self.scales.float()[:, self.groups]
        return (self.codes - zeros) * scales


def quantize(weight: torch.Tensor, group_size: int, groups: torch.Tensor | None = None) -> Codes:
    """Quantize to 16 steps between the smallest and the largest value of each group."""
    if groups is None:
        groups = torch.arange(weight.shape[1]) // group_size
    order = groups.argsort(stable=True)
    grouped = weight[:, order].unflatten(1, (-1, group_size))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15).long()
    codes = weight / scales.float()[:, groups] + zeros[:, groups]
    return Codes(codes.round().clamp(0, 15).long(), zeros, scales, groups)


def quantize_symmetric(weight: torch.Tensor, group_size: int) -> Codes:
    """Quantize to 16 steps around zero, which is code 8, as GPTQ does by default."""
    groups = torch.arange(weight.shape[1]) // group_size
    scales = (weight.unflatten(1, (-1, group_size)).abs().amax(-1) / 7.5).half()
    codes = (weight / scales.float()[:, groups] + 8).round().clamp(0, 15).long()
    return Codes(codes, torch.full(scales.shape, 8), scales, groups)


def pack_words(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack int64 [rows, n] to int32 [rows, n / 8]; nibble k of a word is value order[k]."""
    eights = values.unflatten(1, (-1, 8))
    words = sum(eights[..., order[k]] << 4 * k for k in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq_tensors(codes: Codes, zero_offset: int = 1) -> Tensors:
    return {
        "qweight": pack_words(codes.codes).T,
        "qzeros": pack_words((codes.zeros.T - zero_offset) % 16),
        "scales": codes.scales.T,
        "g_idx": codes.groups.to(torch.int32),
    }


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_tensors(codes: Codes) -> Tensors:
    return {
        "qweight": pack_words(codes.codes.T, AWQ_ORDER),
        "qzeros": pack_words(codes.zeros.T, AWQ_ORDER),
        "scales": codes.scales.T,
    }
