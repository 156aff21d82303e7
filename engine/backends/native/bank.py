"""Describes adapters to the native kernels: tables of pointers, made once per adapter.

A site number indexes the model's list of (layer, site) keys, the same list for every adapter.
Making the batch of a step copies no weights and costs about a microsecond per adapter in it.
"""

import ctypes as c
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import Struct

import torch

from engine.backends.native import structs
from engine.backends.native.panels import PanelWeights
from engine.lora.weights import Site, SiteWeights
from engine.scheduler.batch import ScheduledBatch

# structs.ReefLoraSite and LoraSlice, packed: a new adapter's table is made between two steps, and
# assigning fields one by one takes ctypes twice as long
_SITE, _SLICE = Struct("PPii"), Struct("iiiiPPP")
assert _SITE.size == c.sizeof(structs.ReefLoraSite) and _SLICE.size == c.sizeof(
    structs.ReefLoraSlice
)


class NativeAdapter:
    """One adapter's ReefLoraSite[len(keys)]; sites that it does not change have no slices.

    Needs bfloat16 factors, and scales and shifts in float32. Raises ValueError for others, and for
    a site that is not among `keys`.
    """

    def __init__(self, weights: PanelWeights, keys: Sequence[Site]) -> None:
        unknown = weights.sites.keys() - set(keys)
        if unknown:
            raise ValueError(f"adapter {weights.digest}: {min(unknown)} is no site of this model")
        self.weights = weights  # owns the memory that the tables point to
        self.lora_rank = max((s.a.shape[0] for s in weights.sites.values()), default=0)
        self._slices = (
            structs.ReefLoraSlice * sum(len(s.expands) for s in weights.sites.values())
        )()
        self._sites = (structs.ReefLoraSite * len(keys))()
        self.sites = c.cast(self._sites, c.POINTER(structs.ReefLoraSite))
        next_slice = 0
        for number, key in enumerate(keys):
            site = weights.sites.get(key)
            if site is not None:
                self._fill(number, site, next_slice)
                next_slice += len(site.expands)

    def _fill(self, number: int, site: SiteWeights, first: int) -> None:
        _check(self.weights.digest, site)
        for i, (r0, r1, out0, out1, b) in enumerate(site.expands, first):
            pointers = b.data_ptr(), _column(site.scale, out0), _column(site.shift, out0)
            _SLICE.pack_into(self._slices, i * _SLICE.size, r0, r1, out0, out1, *pointers)
        slices = c.addressof(self._slices) + first * _SLICE.size
        shape = site.a.shape[0], len(site.expands)
        _SITE.pack_into(self._sites, number * _SITE.size, site.a.data_ptr(), slices, *shape)


@dataclass(frozen=True, slots=True)
class NativeLoraBatch:
    """Holds `struct` for the kernels and the memory it points to. Valid until one of its adapters
    is evicted."""

    struct: structs.ReefLoraBatch
    segments: "c.Array[structs.ReefLoraSegment]"
    rows: "array[int]"
    adapters: tuple[NativeAdapter, ...]


class NativeAdapterBank:
    """Holds adapters by slot; `engine.scheduler.adapter_slots` decides which are resident."""

    def __init__(self, keys: Sequence[Site]) -> None:
        self.keys = tuple(keys)
        self._adapters: dict[int, NativeAdapter] = {}

    def load(self, slot: int, weights: PanelWeights) -> None:
        """Put an adapter into a slot, without a copy. Slot and batches keep the weights alive."""
        assert slot > 0 and slot not in self._adapters
        self._adapters[slot] = NativeAdapter(weights, self.keys)

    def evict(self, slot: int) -> None:
        self._adapters.pop(slot, None)

    def batch(
        self, batch: ScheduledBatch, output_rows: Iterable[int] | None = None
    ) -> NativeLoraBatch | None:
        """Return the adapters of the batch's rows, or None if no row has one.

        With `output_rows`, covers these rows of the batch only, numbered from 0 in their order.
        """
        if output_rows is None:
            return self._batch(_rows_by_slot(batch))
        slots = [r.adapter_slot for r in batch.requests for _ in r.token_ids]
        by_slot: dict[int, list[int]] = {}
        for i, row in enumerate(output_rows):
            by_slot.setdefault(slots[row], []).append(i)
        return self._batch(by_slot)

    def _batch(self, by_slot: dict[int, list[int]]) -> NativeLoraBatch | None:
        by_slot.pop(0, None)
        if not by_slot:
            return None
        adapters = tuple(self._adapters[slot] for slot in by_slot)
        rows = array("i")
        ranges: list[tuple[object, int, int]] = []
        for adapter, own in zip(adapters, by_slot.values(), strict=True):
            ranges.append((adapter.sites, len(rows), len(rows) + len(own)))
            rows.extend(own)
        segments = (structs.ReefLoraSegment * len(ranges))(*ranges)
        struct = structs.ReefLoraBatch(
            segments, rows.buffer_info()[0], len(ranges), max(a.lora_rank for a in adapters)
        )
        return NativeLoraBatch(struct, segments, rows, adapters)


def _rows_by_slot(batch: ScheduledBatch) -> dict[int, list[int]]:
    by_slot: dict[int, list[int]] = {}
    row = 0
    for request in batch.requests:
        end = row + len(request.token_ids)
        if request.adapter_slot:
            by_slot.setdefault(request.adapter_slot, []).extend(range(row, end))
        row = end
    return by_slot


def _column(affine: torch.Tensor | None, column: int) -> int:
    return 0 if affine is None else affine.data_ptr() + 4 * column


def _check(digest: str, site: SiteWeights) -> None:
    for tensor in (site.a, *(b for *_, b in site.expands)):
        if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous():
            raise ValueError(
                f"adapter {digest}: factors are {tensor.dtype}, contiguous: "
                f"{tensor.is_contiguous()}; only contiguous bfloat16 is allowed"
            )
    for affine in (site.scale, site.shift):
        if affine is not None and (affine.dtype != torch.float32 or not affine.is_contiguous()):
            raise ValueError(
                f"adapter {digest}: a scale or shift is {affine.dtype}, contiguous: "
                f"{affine.is_contiguous()}; only contiguous float32 is allowed"
            )
