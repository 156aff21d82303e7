"""What every forward pass needs to know of a batch's rows and blocks, as plain numbers."""

from array import array
from collections.abc import Sequence

from engine.scheduler.batch import ScheduledRequest


def row_numbers(
    requests: Sequence[ScheduledRequest], block_size: int
) -> tuple[list[int], list[int], list[int]]:
    """Token ids, positions and slots (block * block_size + offset) of all rows, in order."""
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
    """[B, width] of this `array` typecode, zero-padded, and the width."""
    width = max(len(r.block_table) for r in requests)
    tables = array(typecode)
    for request in requests:
        tables.extend(request.block_table)
        tables.extend((0,) * (width - len(request.block_table)))
    return tables, width
