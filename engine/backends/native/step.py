"""Turns a ScheduledBatch into the arrays that a native program's step reads."""

import ctypes as c
from array import array
from collections.abc import Sequence
from itertools import accumulate
from operator import add

from engine.backends.native import structs
from engine.backends.native.site_table import NativeLoraBatch
from engine.backends.rows import padded_block_tables, row_numbers
from engine.scheduler.batch import ScheduledRequest


class StepArrays:
    """A structs.ReefStep and the memory that it points to."""

    def __init__(
        self,
        requests: Sequence[ScheduledRequest],
        output_rows: list[int],
        block_size: int,
    ) -> None:
        numbers = row_numbers(requests, block_size)
        token_ids, positions, slots = (array("i", values) for values in numbers)
        self.token_ids = token_ids  # read when the step runs
        tables, table_stride = padded_block_tables(requests, "i")
        counts = [len(r.token_ids) for r in requests]
        row_starts = array("i", [0, *accumulate(counts)])
        starts = [r.start for r in requests]
        context_lens = array("i", map(add, starts, counts))
        outputs = array("i", output_rows)
        self._keep = (token_ids, positions, slots, tables, row_starts, context_lens, outputs)
        self._adapters: tuple[object, ...] = ()
        self.step = structs.ReefStep(
            rows=len(token_ids),
            num_outputs=len(outputs),
            token_ids=address(token_ids),
            positions=address(positions),
            slot_mapping=address(slots),
            output_rows=address(outputs),
            requests=structs.ReefRequests(
                num_requests=len(requests),
                table_stride=table_stride,
                row_starts=address(row_starts),
                context_lens=address(context_lens),
                block_tables=address(tables),
            ),
        )

    def use(self, lora: NativeLoraBatch, output_lora: NativeLoraBatch | None) -> None:
        """Set the adapters of all rows, and of the output rows if those have any."""
        self._adapters += (lora, output_lora)
        self.step.lora = c.pointer(lora.struct)
        if output_lora is not None:
            self.step.output_lora = c.pointer(output_lora.struct)

    def use_norms(self, rows: "array[int]", output_rows: "array[int]") -> None:
        """Set the address of each row's ReefNormWeights, or 0, of all rows and the output rows."""
        self._adapters += (rows, output_rows)
        self.step.norms, self.step.output_norms = address(rows), address(output_rows)


def address(values: "array[int]") -> int:
    return values.buffer_info()[0]
