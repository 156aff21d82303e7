"""From a ScheduledBatch to the tensors of one forward pass."""

from array import array
from itertools import accumulate

import torch

from engine.kernels.inputs import AttentionInputs, ForwardInputs, LoraBatch
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest


def build_inputs(
    batch: ScheduledBatch, block_size: int, device: torch.device, lora: LoraBatch | None
) -> ForwardInputs:
    """Rows in the batch's order; one host-to-device copy for all that is per row."""
    requests = batch.requests
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for _, _, new_ids, start, table, *_ in requests:
        token_ids += new_ids
        for position in range(start, start + len(new_ids)):
            positions.append(position)
            slots.append(table[position // block_size] * block_size + position % block_size)
    rows = torch.tensor([token_ids, positions, slots], device=device)
    return ForwardInputs(
        token_ids=rows[0],
        positions=rows[1],
        attention=AttentionInputs(
            num_decodes=sum(len(r.token_ids) == 1 for r in requests),
            cu_seqlens_q=[0, *accumulate(len(r.token_ids) for r in requests)],
            context_lens=[r.end for r in requests],
            block_tables=_block_tables(requests, device),
            slot_mapping=rows[2],
        ),
        lora=lora,
    )


def _block_tables(requests: tuple[ScheduledRequest, ...], device: torch.device) -> torch.Tensor:
    tables = [r.block_table for r in requests]
    width = max(map(len, tables))
    padded = array("q")
    for table in tables:
        padded.extend(table)
        padded.extend((0,) * (width - len(table)))
    return torch.frombuffer(padded, dtype=torch.int64).view(-1, width).to(device)
