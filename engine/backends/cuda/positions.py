"""DevicePositions: the places of a batch's queries and keys, as numbers for kernels.

Holds the content of `engine.model.inputs.AttentionInputs` in fixed shapes on the device: a CUDA
graph that was captured with these tensors serves every batch that fits into them. Padding requests
have a context of 0: one query row each among the decodes, none among the prefills. Needs no Triton:
numpy alone lays out a step's numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from struct import pack_into
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scheduler.batch import ScheduledRequest

NO_REQUEST = -1  # request of a padding tile

Numbers = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PrefillPages:
    """Describes the P prefills of a step, int32 on the host, to a kernel that is planned there.

    Query rows are numbered from the first prefill's. Request i has the keys of the blocks
    pages[page_starts[i] : page_starts[i + 1]], but only last_page_lens[i] of the last block.
    """

    cu_seqlens_q: Tensor  # [P + 1]
    page_starts: Tensor  # [P + 1]
    pages: Tensor  # [page_starts[P]]
    last_page_lens: Tensor  # [P]


@dataclass(frozen=True, slots=True)
class DevicePositions:
    """B requests: `num_decodes` with one query row each, request i's being row i, then prefills.

    The query rows of request i are [cu_seqlens_q[i], cu_seqlens_q[i + 1]), and its last query is
    at position context_lens[i] - 1. A tile covers up to `tile_tokens` query rows from its first
    one on, as far as they belong to its request. Tensors are int32, on the kernels' device.
    """

    context_lens: Tensor  # [B]
    cu_seqlens_q: Tensor  # [B + 1]
    block_tables: Tensor  # [B, W]; columns after a request's last block are never read
    tiles: Tensor  # [T, 2]: request or NO_REQUEST, first query row; of the prefills alone
    num_decodes: int
    tile_tokens: int  # a power of two
    max_context_len: int  # upper bound for this batch, or for all batches of this graph
    prefill_pages: PrefillPages | None = None  # for eager steps whose prefills are planned


@dataclass(frozen=True, slots=True)
class PositionsCapacity:
    """Sizes that DevicePositions have room for."""

    num_decodes: int
    num_prefills: int
    table_width: int
    num_tiles: int
    tile_tokens: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors of DevicePositions, by name, in its order."""
        num_requests = self.num_decodes + self.num_prefills
        return {
            "context_lens": (num_requests,),
            "cu_seqlens_q": (num_requests + 1,),
            "block_tables": (num_requests, self.table_width),
            "tiles": (self.num_tiles, 2),
        }


def prefill_tile_tokens(num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Return the query rows of a prefill tile: times the heads of a group they make 128 rows of a
    matrix product, or 64 if heads are so wide that more would not fit into registers."""
    rows = 128 if head_dim <= 128 else 64
    group = num_heads // num_kv_heads
    return max(1, rows // (1 << (group - 1).bit_length()))


def exact_capacity(requests: Sequence[ScheduledRequest], tile_tokens: int) -> PositionsCapacity:
    """Return the capacity for exactly these requests; decodes, which have one token, come first."""
    lengths = [len(r.token_ids) for r in requests]
    num_decodes = sum(length == 1 for length in lengths)
    return PositionsCapacity(
        num_decodes=num_decodes,
        num_prefills=len(requests) - num_decodes,
        table_width=max((len(r.block_table) for r in requests), default=0),
        num_tiles=sum(-(-length // tile_tokens) for length in lengths[num_decodes:]),
        tile_tokens=tile_tokens,
    )


def write_positions(
    arrays: Mapping[str, Numbers], requests: Sequence[ScheduledRequest], capacity: PositionsCapacity
) -> None:
    """Fill host arrays of `capacity.shapes()`, except unread columns of block tables.

    Raises ValueError if the requests do not fit.

    The requests with one token are the decodes and come first.
    """
    decodes = [r for r in requests if len(r.token_ids) == 1]
    prefills = requests[len(decodes) :]
    _check(requests, decodes, prefills, capacity)
    lengths = np.zeros(capacity.num_decodes + capacity.num_prefills, np.int32)
    lengths[: capacity.num_decodes] = 1
    context_lens = arrays["context_lens"]
    context_lens[:] = 0
    for first, group in ((0, decodes), (capacity.num_decodes, prefills)):
        last = first + len(group)
        lengths[first:last] = [len(r.token_ids) for r in group]
        context_lens[first:last] = [r.end for r in group]
        _write_tables(arrays["block_tables"][first:last], group)
    row_starts = arrays["cu_seqlens_q"]
    row_starts[0] = 0
    np.cumsum(lengths, out=row_starts[1:])
    tiles = _tiles(row_starts, context_lens, capacity)
    arrays["tiles"][: len(tiles)] = tiles
    arrays["tiles"][len(tiles) :] = NO_REQUEST, 0


def copy_positions(
    requests: Sequence[ScheduledRequest],
    tile_tokens: int,
    device: torch.device,
    max_context_len: int,
) -> DevicePositions:
    """Make new tensors of exactly these requests' size, for a batch without a graph."""
    capacity = exact_capacity(requests, tile_tokens)
    shapes = capacity.shapes()
    ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes.values())])
    flat = np.empty(ends[-1], np.int32)
    spans = list(zip(shapes.items(), ends, ends[1:], strict=False))
    arrays = {name: flat[a:b].reshape(shape) for (name, shape), a, b in spans}
    write_positions(arrays, requests, capacity)
    copied = torch.from_numpy(flat).to(device)
    views: dict[str, Any] = {name: copied[a:b].view(shape) for (name, shape), a, b in spans}
    return DevicePositions(
        **views,
        num_decodes=capacity.num_decodes,
        tile_tokens=tile_tokens,
        max_context_len=max_context_len,
    )


def prefill_pages(requests: Sequence[ScheduledRequest], block_size: int) -> PrefillPages:
    """Make the pages of the requests that have more than one token."""
    prefills = [r for r in requests if len(r.token_ids) > 1]
    tables = [r.block_table[: -(-r.end // block_size)] for r in prefills]
    return PrefillPages(
        cu_seqlens_q=_starts([len(r.token_ids) for r in prefills]),
        page_starts=_starts([len(table) for table in tables]),
        pages=torch.tensor([page for table in tables for page in table], dtype=torch.int32),
        last_page_lens=torch.tensor(
            [(r.end - 1) % block_size + 1 for r in prefills], dtype=torch.int32
        ),
    )


def _starts(lengths: list[int]) -> Tensor:
    """Return [len + 1]: the start of each item, and the end of the last one."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _check(
    requests: Sequence[ScheduledRequest],
    decodes: Sequence[ScheduledRequest],
    prefills: Sequence[ScheduledRequest],
    capacity: PositionsCapacity,
) -> None:
    if any(len(r.token_ids) != 1 for r in requests[: len(decodes)]):
        raise ValueError("a prefill comes before a decode: decodes, with one token, must be first")
    width = max((len(r.block_table) for r in requests), default=0)
    tiles = sum(-(-len(r.token_ids) // capacity.tile_tokens) for r in prefills)
    for what, given, allowed in (
        ("decodes", len(decodes), capacity.num_decodes),
        ("prefills", len(prefills), capacity.num_prefills),
        ("blocks of one request", width, capacity.table_width),
        ("prefill tiles", tiles, capacity.num_tiles),
    ):
        if given > allowed:
            raise ValueError(f"{given} {what}: there is room for {allowed}")


def _write_tables(rows: Numbers, requests: Sequence[ScheduledRequest]) -> None:
    """Write block tables with `struct`, in half of numpy's time per number: a large batch of long
    contexts has a hundred thousand of them in every step."""
    for row, request in zip(rows, requests, strict=True):
        table = request.block_table
        pack_into(f"{len(table)}i", row, 0, *table)


def _tiles(row_starts: Numbers, context_lens: Numbers, capacity: PositionsCapacity) -> Numbers:
    """List the tiles, those with the most keys first, so that no long tile starts last."""
    tiles: list[tuple[int, int]] = []
    keys: list[int] = []
    for i in range(capacity.num_decodes, len(context_lens)):
        end = int(row_starts[i + 1])
        for row in range(int(row_starts[i]), end, capacity.tile_tokens):
            tiles.append((i, row))
            keys.append(int(context_lens[i]) - end + min(row + capacity.tile_tokens, end))
    order = np.argsort(-np.array(keys, np.int64), kind="stable")
    return np.array(tiles, np.int32).reshape(-1, 2)[order]
