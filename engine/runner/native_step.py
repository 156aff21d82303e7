"""From a ScheduledBatch to the arrays that a native program's step reads."""

import ctypes as c
from array import array
from collections.abc import Sequence
from itertools import accumulate

from engine.kernels.cpu import structs
from engine.kernels.cpu.adapters import NativeLoraBatch
from engine.scheduler.batch import ScheduledRequest


class StepArrays:
    """A structs.Step and the memory that it points to."""

    def __init__(
        self,
        requests: Sequence[ScheduledRequest],
        output_rows: list[int],
        block_size: int,
    ) -> None:
        token_ids, positions, slots = _rows(requests, block_size)
        tables, table_stride = _block_tables(requests)
        row_starts = array("i", [0, *accumulate(len(r.token_ids) for r in requests)])
        context_lens = array("i", [r.end for r in requests])
        outputs = array("i", output_rows)
        self._keep = (token_ids, positions, slots, tables, row_starts, context_lens, outputs)
        self._adapters: tuple[NativeLoraBatch | None, ...] = ()
        self.step = structs.Step(
            rows=len(token_ids),
            num_outputs=len(outputs),
            token_ids=address(token_ids),
            positions=address(positions),
            slot_mapping=address(slots),
            output_rows=address(outputs),
            requests=structs.Requests(
                num_requests=len(requests),
                table_stride=table_stride,
                row_starts=address(row_starts),
                context_lens=address(context_lens),
                block_tables=address(tables),
            ),
        )

    def use(self, lora: NativeLoraBatch, output_lora: NativeLoraBatch | None) -> None:
        """The adapters of all rows, and of the output rows where those have any."""
        self._adapters = (lora, output_lora)
        self.step.lora = c.pointer(lora.struct)
        if output_lora is not None:
            self.step.output_lora = c.pointer(output_lora.struct)


def address(values: "array[int]") -> int:
    return values.buffer_info()[0]


def _rows(
    requests: Sequence[ScheduledRequest], block_size: int
) -> tuple["array[int]", "array[int]", "array[int]"]:
    """Token ids, positions and slots (block * block_size + offset) of all rows."""
    token_ids, positions, slots = array("i"), array("i"), array("i")
    for _, _, new_ids, start, table, *_ in requests:
        token_ids.extend(new_ids)
        for position in range(start, start + len(new_ids)):
            positions.append(position)
            slots.append(table[position // block_size] * block_size + position % block_size)
    return token_ids, positions, slots


def _block_tables(requests: Sequence[ScheduledRequest]) -> tuple["array[int]", int]:
    """[B, width], zero-padded, and the width."""
    width = max(len(r.block_table) for r in requests)
    tables = array("i")
    for request in requests:
        tables.extend(request.block_table)
        tables.extend((0,) * (width - len(request.block_table)))
    return tables, width
