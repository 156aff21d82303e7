"""From a ScheduledBatch to the tensors of one forward pass."""

from itertools import accumulate

import torch

from engine.kernels.inputs import AttentionInputs, ForwardInputs, LoraBatch
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest


def build_inputs(
    batch: ScheduledBatch, block_size: int, device: torch.device, lora: LoraBatch | None
) -> ForwardInputs:
    """Rows in the batch's order; one host-to-device copy per tensor."""
    requests = batch.requests
    token_ids = [t for r in requests for t in r.token_ids]
    positions = [p for r in requests for p in range(r.start, r.end)]
    slots = [
        r.block_table[p // block_size] * block_size + p % block_size
        for r in requests
        for p in range(r.start, r.end)
    ]
    return ForwardInputs(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        attention=AttentionInputs(
            num_decodes=sum(len(r.token_ids) == 1 for r in requests),
            cu_seqlens_q=[0, *accumulate(len(r.token_ids) for r in requests)],
            context_lens=[r.end for r in requests],
            block_tables=_block_tables(requests, device),
            slot_mapping=torch.tensor(slots, device=device),
        ),
        lora=lora,
    )


def _block_tables(requests: tuple[ScheduledRequest, ...], device: torch.device) -> torch.Tensor:
    width = max(len(r.block_table) for r in requests)
    padded = [[*r.block_table, *[0] * (width - len(r.block_table))] for r in requests]
    return torch.tensor(padded, device=device)
