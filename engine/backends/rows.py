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
            rows += range(end - 1 - request.num_drafts, end)
        elif request.pooled is not None:
            rows += range(start + request.pooled[0], start + request.pooled[1])
        spans.append((first, len(rows)))
    return rows, spans


def sampled_rows(request: ScheduledRequest) -> list[ScheduledRequest]:
    """List, for each row that a token is sampled at, the request as if it ended there: the guesses
    before are output, and none follow."""
    num = request.num_drafts
    if not num:
        return [request]
    output, after = request.history, request.forbidden_after_drafts
    if output is None and not after and request.sampling.temperature == 0:
        return [request] * (num + 1)  # what is sampled does not depend on the position
    known = len(request.token_ids) - num
    rows = [request._replace(token_ids=request.token_ids[:known])]
    for i in range(1, num + 1):
        token_ids = request.token_ids[: known + i]
        history = None if output is None else (output[0], output[1] + token_ids[known:])
        forbidden = after[i - 1] if after else request.forbidden_token_ids
        rows.append(
            request._replace(token_ids=token_ids, history=history, forbidden_token_ids=forbidden)
        )
    return rows


def pooled_sum(hidden: Tensor) -> Tensor:
    """Add rows [M, E] up; in float64, so that cutting a prompt in chunks does not show."""
    return hidden.sum(0, dtype=torch.float64)
