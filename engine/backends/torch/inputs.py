"""Builds the tensors of one forward pass from a ScheduledBatch."""

from itertools import accumulate

import torch

from engine.backends.rows import padded_block_tables, row_numbers
from engine.model.inputs import AttentionInputs, ForwardInputs, LoraBatch, Overlays
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest


def build_inputs(
    batch: ScheduledBatch,
    block_size: int,
    device: torch.device,
    lora: LoraBatch | None,
    overlays: Overlays | None = None,
) -> ForwardInputs:
    """Build the inputs in the batch's order of rows; one copy to the device for all row numbers."""
    requests = batch.requests
    token_ids, positions, slots = row_numbers(requests, block_size)
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
        overlays=overlays,
    )


def _block_tables(requests: tuple[ScheduledRequest, ...], device: torch.device) -> torch.Tensor:
    tables, width = padded_block_tables(requests, "q")
    return torch.frombuffer(tables, dtype=torch.int64).view(-1, width).to(device)
