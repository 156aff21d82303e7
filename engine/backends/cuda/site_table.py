"""SiteTable: numbers a model's sites, kinds and norms, and encodes adapters for kernels."""

from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from engine.backends.cuda.extent import UNIT_BYTES, AdapterExtent, OverlayExtent, SiteExtent
from engine.backends.cuda.places import ModelPlaces
from engine.backends.cuda.triton.lora_work import EMBEDDING_WORDS, SiteKind, record_words
from engine.model.layers import LoraSite


class SiteTable:
    """Numbers sites in the decoder's order; sites of one shape are of one kind."""

    def __init__(self, places: ModelPlaces, max_lora_rank: int) -> None:
        sites, self._places = places.sites, places
        of_sites = [_kind(site) for site in sites]
        self.kinds = tuple(dict.fromkeys(of_sites))
        self.kind_of = tuple(self.kinds.index(kind) for kind in of_sites)
        self.number = {(site.layer, site.site): i for i, site in enumerate(sites)}
        self.max_slices = max(len(kind.out_features) for kind in self.kinds)
        self.max_lora_rank = max_lora_rank
        self.embedding_at = (1 + len(sites)) * self.record_words
        norms_at = self.embedding_at + EMBEDDING_WORDS
        self.norms_at = {name: norms_at + i for i, name in enumerate(places.norms)}

    @property
    def record_words(self) -> int:
        return record_words(self.max_slices)

    @property
    def num_records(self) -> int:
        more = EMBEDDING_WORDS + len(self.norms_at)
        return 1 + len(self.kind_of) + -(-more // self.record_words)

    def check(self, extent: AdapterExtent) -> None:
        """Raise ValueError if an adapter does not fit the model."""
        for key, site in extent.sites.items():
            if key not in self.number:
                raise ValueError(f"adapter {extent.digest}: {key} is no site of this model")
            kind = self.kinds[self.kind_of[self.number[key]]]
            reason = _misfit(site, kind, self.max_lora_rank)
            if reason:
                raise ValueError(f"adapter {extent.digest}: {key} has {reason}")
        for name, norm in extent.norms.items():
            if norm.width != self._places.norms.get(name):
                raise ValueError(
                    f"adapter {extent.digest}: a norm {name!r} of {norm.width} values; "
                    f"the model's has {self._places.norms.get(name, 'no such norm')}"
                )
        for overlay in (extent.embedding, extent.head):
            if overlay is not None and overlay.hidden_size != self._places.hidden_size:
                raise ValueError(
                    f"adapter {extent.digest}: token vectors of {overlay.hidden_size} values; "
                    f"only {self._places.hidden_size} are allowed"
                )

    def records(self, offset_bytes: int, extent: AdapterExtent) -> NDArray[np.int32]:
        """Make [num_records, record_words]: a slot of the table of `triton.lora`."""
        records = np.zeros((self.num_records, self.record_words), np.int32)
        records[0, 0] = offset_bytes // UNIT_BYTES
        for key, site in extent.sites.items():
            number = self.number[key]
            widths = self.kinds[self.kind_of[number]].out_features
            records[1 + number] = _record(site, widths, self.max_slices)
        words = records.reshape(-1)
        if extent.embedding is not None:
            words[self.embedding_at :][:EMBEDDING_WORDS] = _embedding_words(extent.embedding)
        for name, norm in extent.norms.items():
            words[self.norms_at[name]] = _one_based(norm.weight_bytes)
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


def _embedding_words(embedding: OverlayExtent) -> list[int]:
    """List the number of ids and the rank, then the offsets of ids, rows, A and B in units, then
    1 + that of the scale, 0 for none."""
    starts = embedding.ids_bytes, embedding.rows_bytes, embedding.a_bytes, embedding.b_bytes
    units = [start // UNIT_BYTES for start in starts]
    return [embedding.num_ids, embedding.lora_rank, *units, _one_based(embedding.scale_bytes)]


def _one_based(start: int | None) -> int:
    return 0 if start is None else 1 + start // UNIT_BYTES
