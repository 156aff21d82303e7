"""Makes batches for attention, with KV in a shuffled pool, and their results by plain torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from engine.model import reference
from engine.model.inputs import AttentionInputs
from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams


@dataclass(frozen=True)
class Request:
    """`new` queries at the end of `context` keys."""

    context: int
    new: int = 1


@dataclass(frozen=True)
class Batch:
    """Blocks of two layers, of which attention gets the second; unwritten slots are NaN."""

    requests: list[Request]
    scheduled: list[ScheduledRequest]
    kv_layer: Tensor  # [blocks, 2, block_size, H_kv, D], strided
    q: Tensor  # [N, H, D]

    def rows_of(self, index: int) -> slice:
        start = sum(r.new for r in self.requests[:index])
        return slice(start, start + self.requests[index].new)

    def only(self, *indices: int) -> "Batch":
        """Return a batch of these requests alone, over the same blocks."""
        return Batch(
            [self.requests[i] for i in indices],
            [self.scheduled[i] for i in indices],
            self.kv_layer,
            torch.cat([self.q[self.rows_of(i)] for i in indices]),
        )


def make_batch(
    requests: Sequence[Request],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    needed = [-(-r.context // block_size) for r in requests]
    free = torch.randperm(sum(needed) + 3).tolist()
    shape = (len(free), 2, 2, block_size, kv_heads, head_dim)
    kv_layer = torch.full(shape, torch.nan, dtype=dtype)[:, 1]
    scheduled: list[ScheduledRequest] = []
    for request, count in zip(requests, needed, strict=True):
        table = tuple(free.pop() for _ in range(count))
        scheduled.append(_scheduled(request, table))
        position = torch.arange(request.context)
        block = torch.tensor(table)[position // block_size]
        kv = torch.randn(request.context, 2, kv_heads, head_dim, dtype=dtype)
        kv_layer[block, :, position % block_size] = kv
    q = torch.randn(sum(r.new for r in requests), heads, head_dim, dtype=dtype)
    return Batch(list(requests), scheduled, kv_layer, q)


def _scheduled(request: Request, table: tuple[int, ...]) -> ScheduledRequest:
    return ScheduledRequest(
        request_id="",
        choice=0,
        token_ids=[0] * request.new,
        start=request.context - request.new,
        block_table=table,
        adapter_slot=0,
        sampling=SamplingParams(),
        samples=True,
    )


def oracle(
    batch: Batch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    width = max(len(r.block_table) for r in batch.scheduled)
    tables = [[*r.block_table, *[0] * (width - len(r.block_table))] for r in batch.scheduled]
    inputs = AttentionInputs(
        num_decodes=0,
        cu_seqlens_q=[0, *accumulate(r.new for r in batch.requests)],
        context_lens=[r.context for r in batch.requests],
        block_tables=torch.tensor(tables),
        slot_mapping=torch.empty(0),
    )
    exact = batch.q.float(), batch.kv_layer.float(), inputs
    return reference.paged_attention(*exact, scale=scale, window=window, soft_cap=soft_cap)
