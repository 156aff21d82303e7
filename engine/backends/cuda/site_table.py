"""SiteTable: numbers a model's sites and kinds, and encodes adapters for kernels."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from engine.backends.cuda.extent import UNIT_BYTES, AdapterExtent, SiteExtent
from engine.backends.cuda.triton.lora_work import SiteKind, record_words
from engine.model.layers import LoraSite


class SiteTable:
    """Numbers sites in the decoder's order; sites of one shape are of one kind."""

    def __init__(self, sites: Sequence[LoraSite], max_lora_rank: int) -> None:
        of_sites = [_kind(site) for site in sites]
        self.kinds = tuple(dict.fromkeys(of_sites))
        self.kind_of = tuple(self.kinds.index(kind) for kind in of_sites)
        self.number = {(site.layer, site.site): i for i, site in enumerate(sites)}
        self.max_slices = max(len(kind.out_features) for kind in self.kinds)
        self.max_lora_rank = max_lora_rank

    @property
    def record_words(self) -> int:
        return record_words(self.max_slices)

    def check(self, extent: AdapterExtent) -> None:
        """Raise ValueError if an adapter does not fit the sites."""
        for key, site in extent.sites.items():
            if key not in self.number:
                raise ValueError(f"adapter {extent.digest}: {key} is no site of this model")
            kind = self.kinds[self.kind_of[self.number[key]]]
            reason = _misfit(site, kind, self.max_lora_rank)
            if reason:
                raise ValueError(f"adapter {extent.digest}: {key} has {reason}")

    def records(self, offset_bytes: int, extent: AdapterExtent) -> NDArray[np.int32]:
        """Make [1 + sites, record_words]: a slot of `engine.backends.cuda.triton.lora`'s table."""
        records = np.zeros((1 + len(self.kind_of), self.record_words), np.int32)
        records[0, 0] = offset_bytes // UNIT_BYTES
        for key, site in extent.sites.items():
            number = self.number[key]
            widths = self.kinds[self.kind_of[number]].out_features
            records[1 + number] = _record(site, widths, self.max_slices)
        return records

    def ranks(self, extent: AdapterExtent) -> list[int]:
        """Return, for each kind, the largest sum of slice ranks at any of its sites."""
        found = [0] * len(self.kinds)
        for key, site in extent.sites.items():
            kind = self.kind_of[self.number[key]]
            found[kind] = max(found[kind], site.lora_rank)
        return found

    def affine(self, extent: AdapterExtent) -> list[bool]:
        """Return, for each kind, whether the adapter scales or shifts outputs at any of its
        sites."""
        found = [False] * len(self.kinds)
        for key, site in extent.sites.items():
            found[self.kind_of[self.number[key]]] |= site.out_features is not None
        return found


def _kind(site: LoraSite) -> SiteKind:
    return SiteKind(site.in_features, tuple(part.out_features for part in site.slices))


def _misfit(site: SiteExtent, kind: SiteKind, max_lora_rank: int) -> str:
    if site.in_features != kind.in_features:
        return f"{site.in_features} inputs, not {kind.in_features}"
    columns = set(pairwise(accumulate(kind.out_features, initial=0)))
    unknown = {(part.out0, part.out1) for part in site.slices} - columns
    if unknown:
        return f"slices of {kind.out_features} outputs, and none of columns {min(unknown)}"
    if site.out_features not in (None, sum(kind.out_features)):
        return f"scales or shifts of {site.out_features} outputs, not {sum(kind.out_features)}"
    rank = max((part.r1 - part.r0 for part in site.slices), default=0)
    return f"lora_rank {rank}; at most {max_lora_rank} is allowed" if rank > max_lora_rank else ""


def _record(site: SiteExtent, widths: tuple[int, ...], max_slices: int) -> list[int]:
    """List the offsets, in units, of A and of each slice's B, then 0 and each slice's end rank,
    then 1 + the offsets of scale and shift, 0 for none."""
    parts = {part.out0: part for part in site.slices}
    units, ends = [0] * max_slices, [0]
    for i, out0 in enumerate(accumulate(widths[:-1], initial=0)):
        part = parts.get(out0)
        units[i] = part.b_bytes // UNIT_BYTES if part else 0
        ends.append(part.r1 if part else ends[-1])
    assert ends == sorted(ends) and ends[-1] == site.lora_rank, "slices are out of order"
    ends += [ends[-1]] * (max_slices - len(widths))
    affine = [_one_based(start) for start in (site.scale_bytes, site.shift_bytes)]
    return [site.a_bytes // UNIT_BYTES, *units, *ends, *affine]


def _one_based(start: int | None) -> int:
    return 0 if start is None else 1 + start // UNIT_BYTES
