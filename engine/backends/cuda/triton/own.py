"""Own weights: norms and embeddings that a row's adapter has instead of the base's.

A kernel of a batch with adapters reads one word, and no more if no adapter of the batch has any.
Then a row's slot leads to its part of `lora`'s table, and that to the weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from engine.backends.cuda.extent import UNIT_BYTES
from engine.backends.cuda.triton import lora_work
from engine.backends.cuda.triton.lora import LoraMemory
from engine.model.inputs import LoraBatch

SLOTS_AT = tl.constexpr(lora_work.SLOTS_AT)
FLOAT_UNIT = tl.constexpr(UNIT_BYTES // 4)


@dataclass(frozen=True, slots=True)
class OwnWeights:
    """What a batch's adapters have. Addresses do not change from batch to batch."""

    memory: LoraMemory
    words: Tensor  # of the batch's plan
    norms_at: Mapping[str, int]  # by a norm's name: its word in a slot's part of the table
    embedding_at: int  # first word of the embedding's record there


def own_weights(lora: LoraBatch | None) -> OwnWeights | None:
    """Return what a batch says of its adapters' own weights; only TritonLora says anything."""
    return getattr(lora, "own_weights", None)


def own_arguments(own: OwnWeights | None, *names: str | None) -> tuple[Tensor | int | None, ...]:
    """List a kernel's arguments: table, floats, words, stride, and each name's place."""
    if own is None:
        return None, None, None, 0, *(0 for _ in names)
    memory, places = own.memory, (0 if name is None else own.norms_at[name] for name in names)
    return memory.table, memory.floats, own.words, memory.table.stride(0), *places


@triton.jit
def own_weight(weight, table, floats, words, stride, place, row, columns, inside):
    """Return the weight [BLOCK] float32 that the row's adapter has here, or `weight`."""
    slots_at = tl.load(words + SLOTS_AT)
    if slots_at > 0:
        slot = table + tl.load(words + slots_at + row).to(tl.int64) * stride
        at = tl.load(slot + place).to(tl.int64)
        if at > 0:
            own = floats + (tl.load(slot) + at - 1) * FLOAT_UNIT
            weight = tl.load(own + columns, mask=inside, other=0.0)
    return weight
