"""Lists a batch's rows and blocks as plain numbers, for every forward pass."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.scheduler.batch import ScheduledRequest

LOGITS_ROWS = 32  # rows of [*, V] logits that are in memory at once for prompt logprobs


def row_numbers(
    requests: Sequence[ScheduledRequest], block_size: int
) -> tuple[list[int], list[int], list[int]]:
    """List token ids, positions and slots (block * block_size + offset) of all rows, in order."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for _, _, new_ids, start, table, *_ in requests:
        token_ids += new_ids
        for position in range(start, start + len(new_ids)):
            positions.append(position)
            slots.append(table[position // block_size] * block_size + position % block_size)
    return token_ids, positions, slots


def padded_block_tables(
    requests: Sequence[ScheduledRequest], typecode: str
) -> tuple["array[int]", int]:
    """Return [B, width] of this `array` typecode, zero-padded, and the width."""
    width = max(len(r.block_table) for r in requests)
    tables = array(typecode)
    for request in requests:
        tables.extend(request.block_table)
        tables.extend((0,) * (width - len(request.block_table)))
    return tables, width


def wanted_rows(
    requests: Sequence[ScheduledRequest],
) -> tuple[list[int], list[tuple[int, int]]]:
    """List the rows whose hidden states are needed, and each request's span of that list."""
    rows: list[int] = []
    spans: list[tuple[int, int]] = []
    end = 0
    for request in requests:
        start, end = end, end + len(request.token_ids)
        first = len(rows)
        if request.prompt_targets:
            rows += range(start, end)
        elif request.samples:
            rows.append(end - 1)
        elif request.pooled is not None:
            rows += range(start + request.pooled[0], start + request.pooled[1])
        spans.append((first, len(rows)))
    return rows, spans


def pooled_sum(hidden: Tensor) -> Tensor:
    """Add rows [M, E] up; in float64, so that cutting a prompt in chunks does not show."""
    return hidden.sum(0, dtype=torch.float64)
