"""AdapterBank: holds the adapters on the device, each at its own rank, for mixed batches.

There are two ways to compute a linear layer, chosen by how many consecutive rows share an adapter:

    long segments   (prefill chunks)  y += (x A^T) B on the segment's rows alone
    the other rows  (decodes)         the active adapters' A and B are concatenated along the rank,
                                      h = x A_cat^T, h = 0 where row and column differ in adapter,
                                      y += h B_cat

Before that, rows of adapters that scale or shift a layer's outputs are multiplied and moved, all
others by 1 and 0.

The second needs the same few ops for any number of adapters, which matters most on a CPU.
Excluded columns are overwritten with zero, never multiplied by it: a product that overflowed in
one tenant's columns must not become NaN in another's row.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.backends.torch.overlays import MixedHeads, MixedOverlays, group_rows
from engine.lora.weights import LoraWeights, SiteWeights
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest

SEGMENT_ROWS = 16  # segments of at least this many rows are multiplied by their adapter alone
MAX_STACKS = 4  # concatenations that are kept for sets of active adapters that recur

Site = tuple[int, str]  # (layer, site)


@dataclass(frozen=True, slots=True)
class _StackedSite:
    """Active adapters of one site; columns are slice-major: all of slice 0, all of slice 1, ..."""

    a: torch.Tensor  # [R, in]
    columns: torch.Tensor  # [R] slot of each column
    layout: tuple[tuple[int, int, int], ...]  # (slot, first column, end); masks depend on it
    expands: tuple[tuple[int, int, int, int, torch.Tensor], ...]  # (r0, r1, out0, out1, B [r, out])
    affine: "_StackedAffine | None"  # None: no active adapter scales or shifts


@dataclass(frozen=True, slots=True)
class _StackedAffine:
    """Scales and shifts [1 + adapters, out]: of row 0, which is no adapter's, 1 and 0."""

    scale: torch.Tensor
    shift: torch.Tensor


class AdapterBank:
    """Holds weights by slot; `engine.scheduler.adapter_slots` decides which are resident."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._weights: dict[int, LoraWeights] = {}
        self._stacks: OrderedDict[tuple[int, ...], dict[Site, _StackedSite | None]] = OrderedDict()

    def load(self, slot: int, weights: LoraWeights) -> None:
        """Put an adapter into a slot. A CPU copies nothing: device and host memory are one."""
        assert slot > 0 and slot not in self._weights
        self._weights[slot] = weights.to(self.device)

    def evict(self, slot: int) -> None:
        self._weights.pop(slot, None)
        for slots in [s for s in self._stacks if slot in s]:
            del self._stacks[slots]

    def batch(self, batch: ScheduledBatch) -> "MixedAdapters | None":
        """Return the batch's adapters, or None if no row has one."""
        if not any(r.adapter_slot for r in batch.requests):
            return None
        segments, num_stacked, row_slots = _split(batch.requests)
        active = tuple(sorted({s for s in row_slots if s}))
        return MixedAdapters(
            segments=[(start, end, self._weights[slot]) for start, end, slot in segments],
            num_stacked=num_stacked if active else 0,
            row_slots=torch.tensor(row_slots, device=self.device),
            is_shared=len(active) == 1 and 0 not in row_slots,
            stack=self._stack(active),
            active=[(slot, self._weights[slot]) for slot in active],
        )

    def overlays(self, batch: ScheduledBatch) -> MixedOverlays | None:
        """Return what the batch's adapters change beside linear layers, or None."""
        if not any(
            r.adapter_slot and self._weights[r.adapter_slot].changes_rows for r in batch.requests
        ):
            return None
        slots = [r.adapter_slot for r in batch.requests for _ in r.token_ids]
        return MixedOverlays(group_rows(slots, self._weights, self.device))

    def heads(self, adapter_slots: Sequence[int]) -> MixedHeads | None:
        """Return the output layers of rows with these adapters, or None if all are the base's."""
        if all(not slot or self._weights[slot].head is None for slot in adapter_slots):
            return None
        rows = group_rows(adapter_slots, self._weights, self.device)
        return MixedHeads(rows, len(adapter_slots))

    def _stack(self, active: tuple[int, ...]) -> dict[Site, _StackedSite | None]:
        stack = self._stacks.setdefault(active, {})
        self._stacks.move_to_end(active)
        while len(self._stacks) > MAX_STACKS:
            self._stacks.popitem(last=False)
        return stack


class MixedAdapters:
    """A LoraBatch in which every row has its own adapter, or none."""

    def __init__(
        self,
        segments: list[tuple[int, int, LoraWeights]],
        num_stacked: int,
        row_slots: torch.Tensor,  # [num_stacked]
        is_shared: bool,
        stack: dict[Site, _StackedSite | None],
        active: list[tuple[int, LoraWeights]],
    ) -> None:
        self._segments = segments
        self._num_stacked = num_stacked
        self._row_slots = row_slots
        self._is_shared = is_shared
        self._stack = stack
        self._active = active
        self._masks: dict[tuple[tuple[int, int, int], ...], torch.Tensor] = {}
        self._row_indices: torch.Tensor | None = None  # of stacked rows among the active adapters

    def add(self, layer: int, site: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Apply each row's adapter in place: y [N, out] = y * scale + shift + (x [N, in] A^T) B."""
        for start, end, weights in self._segments:
            own = weights.sites.get((layer, site))
            if own is not None:
                _add_segment(own, x[start:end], y[start:end])
        if self._num_stacked:
            self._add_stacked((layer, site), x[: self._num_stacked], y[: self._num_stacked])

    def _add_stacked(self, key: Site, x: torch.Tensor, y: torch.Tensor) -> None:
        if key not in self._stack:
            self._stack[key] = _stack_site(self._active, key, x.device)
        stacked = self._stack[key]
        if stacked is None:
            return
        if stacked.affine is not None:
            self._apply_affine(stacked.affine, y)
        h = x @ stacked.a.T
        if not self._is_shared:
            h.masked_fill_(self._mask(stacked), 0)
        for r0, r1, out0, out1, b in stacked.expands:
            y[:, out0:out1].addmm_(h[:, r0:r1], b)

    def _apply_affine(self, affine: _StackedAffine, y: torch.Tensor) -> None:
        if self._row_indices is None:
            slots = torch.tensor([0, *(slot for slot, _ in self._active)], device=y.device)
            self._row_indices = torch.searchsorted(slots, self._row_slots)
        rows = self._row_indices
        y.copy_(torch.addcmul(affine.shift[rows], y.float(), affine.scale[rows]))

    def _mask(self, stacked: _StackedSite) -> torch.Tensor:
        """Make [rows, R], True for another adapter's columns; most sites share one layout."""
        key = stacked.layout
        if key not in self._masks:
            self._masks[key] = self._row_slots[:, None] != stacked.columns
        return self._masks[key]


def _add_segment(own: SiteWeights, x: torch.Tensor, y: torch.Tensor) -> None:
    if own.scale is not None or own.shift is not None:
        y.copy_(y.float() * _or(own.scale, 1.0) + _or(own.shift, 0.0))
    h = x @ own.a.T
    for r0, r1, out0, out1, b in own.expands:
        y[:, out0:out1].addmm_(h[:, r0:r1], b)


def _or(vector: torch.Tensor | None, neutral: float) -> torch.Tensor | float:
    return neutral if vector is None else vector


def _split(
    requests: tuple[ScheduledRequest, ...],
) -> tuple[list[tuple[int, int, int]], int, list[int]]:
    """Return (long segments with an adapter, number of leading rows left to stack, their slots)."""
    segments: list[tuple[int, int, int]] = []
    row_slots: list[int] = []
    row = 0
    for request in requests:  # short ones come first
        count = len(request.token_ids)
        if count < SEGMENT_ROWS:
            row_slots += request.row_slots
        elif request.adapter_slot:
            segments.append((row + request.num_base_rows, row + count, request.adapter_slot))
        row += count
    return segments, len(row_slots), row_slots


def _stack_site(
    active: list[tuple[int, LoraWeights]], key: Site, device: torch.device
) -> _StackedSite | None:
    """Concatenate the active adapters' factors of one site, slice by slice."""
    parts = [(slot, w.sites[key]) for slot, w in active if key in w.sites]
    if not parts:
        return None
    rows: list[torch.Tensor] = []
    layout: list[tuple[int, int, int]] = []
    expands: list[tuple[int, int, int, int, torch.Tensor]] = []
    total = 0
    outs = sorted({(out0, out1) for _, site in parts for _, _, out0, out1, _ in site.expands})
    for out0, out1 in outs:
        start, bs = total, []
        for slot, site in parts:
            for r0, r1, o0, o1, b in site.expands:
                if (o0, o1) == (out0, out1):
                    rows.append(site.a[r0:r1])
                    bs.append(b)
                    layout.append((slot, total, total + r1 - r0))
                    total += r1 - r0
        expands.append((start, total, out0, out1, torch.cat(bs)))
    columns = [slot for slot, c0, c1 in layout for _ in range(c1 - c0)]
    return _StackedSite(
        a=torch.cat(rows) if rows else parts[0][1].a[:0],
        columns=torch.tensor(columns, device=device),
        layout=tuple(layout),
        expands=tuple(expands),
        affine=_stack_affine([w.sites.get(key) for _, w in active]),
    )


def _stack_affine(sites: list[SiteWeights | None]) -> _StackedAffine | None:
    """Stack scales and shifts in the order of the adapters; None if none has any."""
    found = [t for site in sites if site for t in (site.scale, site.shift) if t is not None]
    if not found:
        return None
    shape = 1 + len(sites), len(found[0])
    scale, shift = found[0].new_ones(shape), found[0].new_zeros(shape)
    for i, site in enumerate(sites, 1):
        if site is not None and site.scale is not None:
            scale[i] = site.scale
        if site is not None and site.shift is not None:
            shift[i] = site.shift
    return _StackedAffine(scale, shift)
