"""Holds adapters for the native kernels, and says which rows of a batch they change.

A site number indexes the model's list of (layer, site) keys, a norm's number its list of norms;
both lists are the same for every adapter.
"""

import ctypes as c
from array import array
from collections.abc import Iterable, Mapping, Sequence

from engine.backends.native.overlays import Embedding, Head
from engine.backends.native.panels import PanelWeights
from engine.backends.native.site_table import NativeLoraBatch, SiteTable
from engine.lora.weights import Site
from engine.scheduler.batch import ScheduledBatch


class NativeAdapter:
    """One adapter's tables. Raises ValueError for a site or norm that the model lacks."""

    def __init__(
        self, weights: PanelWeights, keys: Sequence[Site], norm_names: Sequence[str] = ()
    ) -> None:
        digest = weights.digest
        _refuse(digest, "site", weights.sites.keys() - set(keys))
        _refuse(digest, "norm", weights.norms.keys() - set(norm_names))
        self.weights = weights  # owns the memory that the tables point to
        self.table = SiteTable(digest, [weights.sites.get(key) for key in keys])
        norms = [weights.norms.get(name) for name in norm_names] if weights.norms else []
        pointers = [None if norm is None else norm.data_ptr() for norm in norms]
        self._norms = (c.c_void_p * len(pointers))(*pointers)

    @property
    def norms(self) -> int:
        """The address of its ReefNormWeights, or 0 if it replaces none."""
        return c.addressof(self._norms) if len(self._norms) else 0


class NativeAdapterBank:
    """Holds adapters by slot; `engine.scheduler.adapter_slots` decides which are resident."""

    def __init__(self, keys: Sequence[Site], norm_names: Sequence[str] = ()) -> None:
        self.keys, self.norm_names = tuple(keys), tuple(norm_names)
        self._adapters: dict[int, NativeAdapter] = {}
        self._norms: dict[int, int] = {}  # addresses, of those that replace norms
        self._embeddings: dict[int, Embedding] = {}
        self._heads: dict[int, Head] = {}

    def load(self, slot: int, weights: PanelWeights) -> None:
        """Put an adapter into a slot, without a copy. Slot and batches keep the weights alive."""
        assert slot > 0 and slot not in self._adapters
        adapter = self._adapters[slot] = NativeAdapter(weights, self.keys, self.norm_names)
        if adapter.norms:
            self._norms[slot] = adapter.norms
        if weights.embedding is not None:
            self._embeddings[slot] = weights.embedding
        if weights.head is not None:
            self._heads[slot] = weights.head

    def evict(self, slot: int) -> None:
        for held in (self._adapters, self._norms, self._embeddings, self._heads):
            held.pop(slot, None)

    def batch(
        self, batch: ScheduledBatch, output_rows: Iterable[int] | None = None
    ) -> NativeLoraBatch | None:
        """Return the adapters of the batch's rows, or None if no row has one.

        With `output_rows`, covers these rows of the batch only, numbered from 0 in their order.
        """
        if output_rows is None:
            return self._batch(_rows_by_slot(batch))
        slots = _slots(batch)
        return self._batch(rows_by_slot([slots[row] for row in output_rows]))

    def norms(
        self, batch: ScheduledBatch, output_rows: Iterable[int]
    ) -> "tuple[array[int], array[int]] | None":
        """Return the address of each row's ReefNormWeights, or 0, of all rows and of the output
        rows; None if no adapter of the batch replaces norms."""
        if not self._any(self._norms, batch):
            return None
        rows = array("Q", [self._norms.get(slot, 0) for slot in _slots(batch)])
        return rows, array("Q", [rows[row] for row in output_rows])

    def embeddings(self, batch: ScheduledBatch) -> list[tuple[Embedding, list[int]]]:
        """Return the adapters of the batch that change embeddings, each with its rows."""
        if not self._any(self._embeddings, batch):
            return []
        rows = _rows_by_slot(batch).items()
        return [(self._embeddings[s], own) for s, own in rows if own and s in self._embeddings]

    def heads(self, adapter_slots: Sequence[int]) -> list[tuple[Head, list[int]]]:
        """Return those of the rows' adapters that change the output layer, each with its rows."""
        if not self._heads or self._heads.keys().isdisjoint(adapter_slots):
            return []
        rows = rows_by_slot(adapter_slots)
        return [(self._heads[s], own) for s, own in rows.items() if s in self._heads]

    def _any(self, held: Mapping[int, object], batch: ScheduledBatch) -> bool:
        return bool(held) and any(r.adapter_slot in held for r in batch.requests)

    def _batch(self, by_slot: dict[int, list[int]]) -> NativeLoraBatch | None:
        by_slot.pop(0, None)
        if not by_slot:
            return None
        return NativeLoraBatch.make(
            [(self._adapters[slot].table, rows) for slot, rows in by_slot.items()]
        )


def rows_by_slot(slots: Iterable[int]) -> dict[int, list[int]]:
    by_slot: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        by_slot.setdefault(slot, []).append(row)
    return by_slot


def _slots(batch: ScheduledBatch) -> list[int]:
    return [slot for r in batch.requests for slot in r.row_slots]


def _rows_by_slot(batch: ScheduledBatch) -> dict[int, list[int]]:
    by_slot: dict[int, list[int]] = {}
    row = 0
    for request in batch.requests:
        end = row + len(request.token_ids)
        if request.adapter_slot:
            first = row + request.num_base_rows
            by_slot.setdefault(request.adapter_slot, []).extend(range(first, end))
        row = end
    return by_slot


def _refuse(digest: str, what: str, unknown: "set[Site] | set[str]") -> None:
    if unknown:
        raise ValueError(f"adapter {digest}: {min(unknown)} is no {what} of this model")
