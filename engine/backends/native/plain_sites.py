"""Describes one adapter, as it was read, to the kernels that compute its reference."""

import ctypes as c
from collections.abc import Mapping, Sequence
from struct import Struct

import torch
from torch import Tensor

from engine.backends.native import structs
from engine.lora.weights import Site, SiteWeights
from engine.model.layers import LoraSite

# structs.ReefPlainSlice and PlainSite: assigning fields one by one takes ctypes twice as long
_SLICE, _SITE = Struct("Piiii"), Struct("PPPPiiii")
assert _SLICE.size == c.sizeof(structs.ReefPlainSlice) and _SITE.size == c.sizeof(
    structs.ReefPlainSite
)


class PlainSites:
    """`struct` is a step's, and this keeps what it points to. Needs bfloat16 factors: `are_plain`.

    `lora_sites` are the program's, in order; the adapter acts on its rows from `first` on.
    """

    def __init__(
        self,
        weights: Mapping[Site, SiteWeights],
        lora_sites: Sequence[LoraSite],
        num_rows: int,
        first: int,
    ) -> None:
        self._keep: list[Tensor] = []
        self._slices = (structs.ReefPlainSlice * sum(len(s.expands) for s in weights.values()))()
        self._sites = (structs.ReefPlainSite * len(lora_sites))()  # zero: the adapter has no such
        next_slice = 0
        for number, lora_site in enumerate(lora_sites):
            site = weights.get((lora_site.layer, lora_site.site))
            if site is not None:
                self._fill(number, site, lora_site.out_features, next_slice)
                next_slice += len(site.expands)
        most = max((len(site.a) for site in weights.values()), default=0)
        self._h = torch.empty(num_rows * most)
        sites = c.cast(self._sites, c.POINTER(structs.ReefPlainSite))
        self.struct = structs.ReefPlainLora(sites, self._h.data_ptr(), first)

    def _fill(self, number: int, site: SiteWeights, width: int, first: int) -> None:
        for i, (r0, r1, out0, out1, b) in enumerate(site.expands, first):
            _SLICE.pack_into(self._slices, i * _SLICE.size, self._at(b), r0, r1, out0, out1)
        affine = (0 if t is None else self._at(t) for t in (site.scale, site.shift))
        slices = c.addressof(self._slices) + first * _SLICE.size
        shape = len(site.expands), len(site.a), width, 0
        at = number * _SITE.size
        _SITE.pack_into(self._sites, at, self._at(site.a), *affine, slices, *shape)

    def _at(self, tensor: Tensor) -> int:
        whole = tensor.contiguous()
        self._keep.append(whole)
        return whole.data_ptr()


def are_plain(weights: Mapping[Site, SiteWeights]) -> bool:
    """Check the types that the kernels read."""
    return all(
        all(t.dtype == torch.bfloat16 for t in (site.a, *(b for *_, b in site.expands)))
        and all(t is None or t.dtype == torch.float32 for t in (site.scale, site.shift))
        for site in weights.values()
    )
