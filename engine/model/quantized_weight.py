"""QuantizedWeight: holds a linear layer's low-bit weight in one simple, common layout.

Checkpoint readers and quantizers produce it, and every kernel packs it into its own layout.
`dequantize` defines the meaning of each format and is the reference in all tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# The 16 values of a 4-bit normal float (Dettmers et al. 2023, QLoRA), in the order of their codes
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
INT4_MIDDLE = 8  # the zero of int4 codes that have no zeros of their own
MOST_MULTIPLIER = 15  # of int4 codes, whose product with it an int8 holds
BYTE_FORMATS = ("int8", "fp8")  # one code per byte; the others have two
CHUNK_VALUES = 2**18  # values converted to float32 at a time: about a core's cache


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One weight [out, in].

    int8:  weight = codes * scales                        codes int8 [out, in], scales [out, 1]
    fp8:   weight = codes * scales                        codes e4m3 [out, in], scales [out, 1]
    nf4:   weight = NF4_VALUES[codes] * scales            codes uint8 [out, in / 2], scales [out, G]
    int4:  weight = (codes - zeros) * scales              codes uint8 [out, in / 2], both [out, G]
           without zeros, symmetric: (codes - 8) * scales
           with multipliers int8 [out, G]: (codes - 8) * multipliers * scales, scales [out, 1]

    4-bit codes lie two in a byte, the even input in the low half. Scales and zeros are float32,
    one per output and group of `group_size` adjacent inputs, G = in / group_size. With an
    `input_order` (int32 [in]), column k of the codes belongs to input input_order[k].
    """

    format: str
    codes: Tensor
    scales: Tensor
    group_size: int
    zeros: Tensor | None = None
    input_order: Tensor | None = None
    multipliers: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * (1 if self.format in BYTE_FORMATS else 2)

    @property
    def nbytes(self) -> int:
        extras = (self.zeros, self.input_order, self.multipliers)
        extra = sum(t.nbytes for t in extras if t is not None)
        return self.codes.nbytes + self.scales.nbytes + extra

    def rows(self, rows: slice) -> "QuantizedWeight":
        """Return a view of some of the outputs."""
        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[rows],
            zeros=None if self.zeros is None else self.zeros[rows],
            multipliers=None if self.multipliers is None else self.multipliers[rows],
        )


def can_join(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Whether both have equal settings and inputs, so that one matrix can hold their outputs."""
    if (a.format, a.group_size, a.in_features) != (b.format, b.group_size, b.in_features):
        return False
    if (a.zeros is None) != (b.zeros is None) or (a.multipliers is None) != (b.multipliers is None):
        return False
    if a.input_order is None or b.input_order is None:
        return a.input_order is b.input_order
    return torch.equal(a.input_order, b.input_order)


def join(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Join the outputs of all parts, in order, in one matrix; each pair must pass `can_join`."""
    first = parts[0]
    if len(parts) == 1:
        return first
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=_join_some([part.zeros for part in parts]),
        multipliers=_join_some([part.multipliers for part in parts]),
    )


def _join_some(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Join tensors that either all parts have or none."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def pack_pairs(codes: Tensor) -> Tensor:
    """Pack uint8 codes [out, in] below 16 to [out, in / 2], the even input in the low half."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_pairs(packed: Tensor) -> Tensor:
    """Invert `pack_pairs`: return uint8 codes [out, in]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Return the weight [out, in] in float32, with inputs in the layer's order."""
    by_group = weight.scales if weight.multipliers is None else weight.multipliers
    values = _values(weight).view(weight.out_features, by_group.shape[1], -1)
    if weight.zeros is not None:
        values = values - weight.zeros[..., None]
    if weight.multipliers is not None:
        values = values * weight.multipliers[..., None]
    wide = (values * weight.scales[..., None]).flatten(1)
    if weight.input_order is None:
        return wide
    restored = torch.empty_like(wide)
    restored[:, weight.input_order.long()] = wide
    return restored


def dequantize_to(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Dequantize to `dtype` on `device`; only a few rows at a time are copied in float32."""
    dense = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=device)
    step = max(1, CHUNK_VALUES // weight.in_features)
    for start in range(0, weight.out_features, step):
        rows = slice(start, start + step)
        dense[rows] = dequantize(weight.rows(rows))
    return dense


def _values(weight: QuantizedWeight) -> Tensor:
    if weight.format in BYTE_FORMATS:
        return weight.codes.float()
    codes = unpack_pairs(weight.codes)
    if weight.format == "int4":
        return codes.float() if weight.zeros is not None else codes.float() - INT4_MIDDLE
    return torch.tensor(NF4_VALUES, device=codes.device)[codes.long()]
