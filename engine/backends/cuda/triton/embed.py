"""Embeds tokens of a batch with adapters: rows of the base's matrix, or of the row's adapter.

An adapter may have rows of its own, for any ids, a scale [E] of all rows, and factors A [V, r] and
B [r, E] that add A B to the matrix. Its record in `lora`'s table: the number of its ids and the
rank, then the offsets, in units from the start of its extent, of ids (int64, ascending), rows, A
and B, and 1 + that of the scale, 0 for none.
"""

import triton
import triton.language as tl
from torch import Tensor

from engine.backends.cuda.extent import UNIT_BYTES
from engine.backends.cuda.triton.own import FLOAT_UNIT, SLOTS_AT, OwnWeights

BLOCK, WARPS = 512, 4  # columns per program
RANKS = 8  # rows of B that are read at once
LONG_UNIT = tl.constexpr(UNIT_BYTES // 8)


def embed(token_ids: Tensor, weight: Tensor, scale: float, own: OwnWeights, out: Tensor) -> None:
    """Write out [N, E] = scale times each token's vector, rounded once.

    token_ids [N] int32; weight [V, E], the base's. Ids from V on must have rows in their adapter.
    """
    memory, width = own.memory, weight.shape[1]
    _embed_kernel[(len(token_ids), triton.cdiv(width, BLOCK))](
        token_ids,
        weight,
        out,
        memory.arena,
        memory.floats,
        memory.longs,
        memory.table,
        own.words,
        memory.table.stride(0),
        own.embedding_at,
        weight.shape[0],
        out.stride(0),
        scale,
        WIDTH=width,
        UNIT=UNIT_BYTES // weight.dtype.itemsize,
        BLOCK=BLOCK,
        RANKS=RANKS,
        num_warps=WARPS,
    )


@triton.jit(do_not_specialize=["table_stride", "place", "vocab"])
def _embed_kernel(
    token_ids,
    weight,
    out,
    arena,
    floats,
    longs,
    table,
    words,
    table_stride,
    place,
    vocab,
    out_stride,
    scale,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    base = weight + tl.minimum(token, vocab - 1) * WIDTH
    vector = tl.load(base + column, mask=inside, other=0.0).to(tl.float32)
    slots_at = tl.load(words + SLOTS_AT)
    if slots_at > 0:
        slot = table + tl.load(words + slots_at + row).to(tl.int64) * table_stride
        start = tl.load(slot).to(tl.int64)
        record = slot + place
        num_ids = tl.load(record)
        if num_ids > 0:
            ids = longs + (start + tl.load(record + 2)) * LONG_UNIT
            low = tl.full((), 0, tl.int32)
            high = num_ids
            while low < high:  # the first id that is not smaller
                middle = (low + high) // 2
                is_smaller = tl.load(ids + middle) < token
                low = tl.where(is_smaller, middle + 1, low)
                high = tl.where(is_smaller, high, middle)
            place_of = tl.minimum(low, num_ids - 1).to(tl.int64)
            if tl.load(ids + place_of) == token:
                own = arena + (start + tl.load(record + 3)) * UNIT + place_of * WIDTH
                vector = tl.load(own + column, mask=inside, other=0.0).to(tl.float32)
        scale_at = tl.load(record + 6).to(tl.int64)
        if scale_at > 0:
            of_column = floats + (start + scale_at - 1) * FLOAT_UNIT
            vector *= tl.load(of_column + column, mask=inside, other=0.0)
        rank = tl.load(record + 1)
        a = arena + (start + tl.load(record + 4)) * UNIT + token * rank
        b = arena + (start + tl.load(record + 5)) * UNIT
        for r0 in range(0, rank, RANKS):
            r = r0 + tl.arange(0, RANKS)
            of_token = tl.load(a + r, mask=r < rank, other=0.0).to(tl.float32)
            b_at = b + r[:, None].to(tl.int64) * WIDTH + column[None, :]
            b_mask = (r < rank)[:, None] & inside[None, :]
            rows = tl.load(b_at, mask=b_mask, other=0.0).to(tl.float32)
            vector += tl.sum(of_token[:, None] * rows, 0)
    scaled = (vector * scale).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, scaled, mask=inside)
