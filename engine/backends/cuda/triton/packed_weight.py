"""PackedWeight: holds a QuantizedWeight in the order in which the Triton kernels read it.

Outputs are cut into panels of 64, inputs into blocks of 64 (or 32, if groups are no multiple of
64). The codes of one block of a panel are contiguous, output after output: a program reads
kilobytes in one run, each thread 16 bytes of one output.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.quantized_weight import NF4_VALUES, QuantizedWeight

PANEL = 64  # outputs
BLOCK = 64  # inputs
SMALL_BLOCK = 32  # if groups are no multiple of 64
OUT_STEP = 128  # outputs are padded to a multiple: a program takes one or two panels
FORMATS = ("int8", "nf4", "int4")


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Codes in 32-bit words, inputs from the lowest bits up; int8 codes are stored plus 128."""

    format: str
    words: Tensor  # int32 [panels, blocks, 64, words of a block]
    scales: Tensor  # float32 [G, padded outputs]
    zeros: Tensor | None  # as scales
    has_whole_zeros: bool  # true for all integer formats; other zeros are exact too, but slower
    values: Tensor  # float32 [16]: value of each nf4 code
    input_order: Tensor | None  # int64 [in]: column k belongs to input input_order[k]
    out_features: int
    in_features: int
    block: int  # inputs

    @property
    def blocks(self) -> int:
        return self.words.shape[1]

    @property
    def out_padded(self) -> int:
        return self.scales.shape[1]

    @property
    def group_blocks(self) -> int:
        return self.blocks // len(self.scales)

    @property
    def nbytes(self) -> int:
        tensors = (self.words, self.scales, self.zeros, self.values, self.input_order)
        return sum(t.nbytes for t in tensors if t is not None)


def pack(weight: QuantizedWeight, device: torch.device) -> PackedWeight:
    """Pack a weight on `device`. Raises ValueError if the kernels do not support it."""
    _check(weight)
    block = BLOCK if weight.format == "int8" or weight.group_size % BLOCK == 0 else SMALL_BLOCK
    order = weight.input_order
    return PackedWeight(
        format=weight.format,
        words=_words(weight, block, device),
        scales=_by_group(weight.scales.to(device)),
        zeros=None if weight.zeros is None else _by_group(weight.zeros.to(device)),
        has_whole_zeros=weight.zeros is not None and _are_whole(weight.zeros),
        values=torch.tensor(NF4_VALUES, device=device),
        input_order=None if order is None else order.to(device, torch.int64, copy=True),
        out_features=weight.out_features,
        in_features=weight.in_features,
        block=block,
    )


def _words(weight: QuantizedWeight, block: int, device: torch.device) -> Tensor:
    codes = weight.codes.to(device)
    if weight.format == "int8":
        codes = codes.view(torch.uint8) ^ 128
    per_byte = 1 if weight.format == "int8" else 2
    short = -codes.shape[1] % (block // per_byte)  # nonzero only for int8: the kernels mask x there
    codes = torch.nn.functional.pad(codes, (0, short, 0, -len(codes) % OUT_STEP))
    by_output = codes.contiguous().view(torch.int32)
    words = block // per_byte // 4
    return (
        by_output.view(-1, PANEL, by_output.shape[1] // words, words).transpose(1, 2).contiguous()
    )


def _by_group(values: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(values.float(), (0, 0, 0, -len(values) % OUT_STEP))
    return padded.t().contiguous()


def _are_whole(zeros: Tensor) -> bool:
    """Whether zeros are whole numbers, small enough that their sums with 2^23 are exact."""
    return bool((zeros == zeros.round()).all() and (zeros.abs() < 2**10).all())


def _check(weight: QuantizedWeight) -> None:
    if weight.format not in FORMATS:
        raise ValueError(f"weight format {weight.format!r}: allowed are {', '.join(FORMATS)}")
    if weight.format == "int8":
        _check_tensors(weight, torch.int8, groups=1)
        return
    size, in_features = weight.group_size, weight.in_features
    if size <= 0 or size % SMALL_BLOCK or in_features % size:
        raise ValueError(
            f"group_size {size} of {in_features} inputs: expected a multiple of {SMALL_BLOCK} "
            f"that divides them"
        )
    _check_tensors(weight, torch.uint8, groups=in_features // size)


def _check_tensors(weight: QuantizedWeight, dtype: torch.dtype, groups: int) -> None:
    expected = (weight.out_features, groups)
    if weight.codes.dtype != dtype or weight.scales.shape != expected:
        raise ValueError(
            f"codes {weight.codes.dtype}, scales {tuple(weight.scales.shape)}: expected {dtype} "
            f"and {expected}"
        )
    zeros = None if weight.zeros is None else tuple(weight.zeros.shape)
    if (zeros is None) == (weight.format == "int4") or zeros not in (None, expected):
        wanted = expected if weight.format == "int4" else None
        raise ValueError(f"zeros {zeros} of a weight in {weight.format}: expected {wanted}")
    order = weight.input_order
    if order is not None and (
        order.shape != (weight.in_features,)
        or not torch.equal(order.sort().values.long().cpu(), torch.arange(weight.in_features))
    ):
        raise ValueError(f"input_order is no permutation of the {weight.in_features} inputs")
