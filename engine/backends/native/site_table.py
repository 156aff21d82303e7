"""Describes factors, scales and shifts to the native kernels: tables of pointers, made once.

Making the batch of a step copies no weights and costs about a microsecond per adapter in it.
"""

import ctypes as c
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

import torch

from engine.backends.native import structs
from engine.lora.weights import SiteWeights

# structs.ReefLoraSite and LoraSlice, packed: a new adapter's table is made between two steps, and
# assigning fields one by one takes ctypes twice as long
_SITE, _SLICE = Struct("PPii"), Struct("iiiiPPP")
assert _SITE.size == c.sizeof(structs.ReefLoraSite) and _SLICE.size == c.sizeof(
    structs.ReefLoraSlice
)


class SiteTable:
    """An adapter's ReefLoraSite for each of `sites`; those that it does not change are None.

    Needs bfloat16 factors with B in panels, and scales and shifts in float32. Raises ValueError for
    others. Keeps the tensors alive.
    """

    def __init__(self, digest: str, sites: Sequence[SiteWeights | None]) -> None:
        self._digest, self._weights = digest, tuple(sites)
        changed = [site for site in sites if site is not None]
        self.lora_rank = max((len(site.a) for site in changed), default=0)
        self._slices = (structs.ReefLoraSlice * sum(len(site.expands) for site in changed))()
        self._sites = (structs.ReefLoraSite * len(sites))()
        self.pointer = c.cast(self._sites, c.POINTER(structs.ReefLoraSite))
        next_slice = 0
        for number, site in enumerate(sites):
            if site is not None:
                self._fill(number, site, next_slice)
                next_slice += len(site.expands)

    def _fill(self, number: int, site: SiteWeights, first: int) -> None:
        _check(self._digest, site)
        for i, (r0, r1, out0, out1, b) in enumerate(site.expands, first):
            pointers = b.data_ptr(), _column(site.scale, out0), _column(site.shift, out0)
            _SLICE.pack_into(self._slices, i * _SLICE.size, r0, r1, out0, out1, *pointers)
        slices = c.addressof(self._slices) + first * _SLICE.size
        shape = site.a.shape[0], len(site.expands)
        _SITE.pack_into(self._sites, number * _SITE.size, site.a.data_ptr(), slices, *shape)


@dataclass(frozen=True, slots=True)
class NativeLoraBatch:
    """Holds `struct` for the kernels and all memory that it points to."""

    struct: structs.ReefLoraBatch
    segments: "c.Array[structs.ReefLoraSegment]"
    rows: "array[int]"
    tables: tuple[SiteTable, ...]

    @staticmethod
    def make(parts: Sequence[tuple[SiteTable, Sequence[int]]]) -> "NativeLoraBatch":
        """List the rows of a batch that each table changes; all tables have the same sites."""
        rows = array("i")
        ranges: list[tuple[object, int, int]] = []
        for table, own in parts:
            ranges.append((table.pointer, len(rows), len(rows) + len(own)))
            rows.extend(own)
        segments = (structs.ReefLoraSegment * len(ranges))(*ranges)
        most = max(table.lora_rank for table, _ in parts)
        struct = structs.ReefLoraBatch(segments, rows.buffer_info()[0], len(ranges), most)
        return NativeLoraBatch(struct, segments, rows, tuple(table for table, _ in parts))


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
