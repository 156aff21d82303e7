"""Loads what an adapter changes of the linear layers: factors, scales and shifts, site by site."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_store.layout import LoraModule, SavedTensor
from engine.lora.affine import SliceVectors, dora_scale, slice_shift
from engine.lora.compact import stored_shapes, whole_factors
from engine.lora.source import Source
from engine.lora.weights import AdapterLoadError, Expand, Sites, SiteWeights
from engine.model.layers import LoraSite, LoraSlice


@dataclass(frozen=True, slots=True)
class _Change:
    """What becomes of one module; its outputs start at column `out0` of the site's."""

    part: LoraSlice
    out0: int
    module: LoraModule | None
    bias: SavedTensor | None

    @property
    def columns(self) -> slice:
        return slice(self.out0, self.out0 + self.part.out_features)

    @property
    def lora_rank(self) -> int:
        return 0 if self.module is None else self.module.lora_rank


def load_sites(
    modules: dict[str, LoraModule],
    biases: dict[str, SavedTensor],
    sites: Sequence[LoraSite],
    source: Source,
) -> Sites:
    """Load the linear layers. Raises AdapterLoadError for a module that the base does not have."""
    modules, biases = dict(modules), dict(biases)
    loaded: Sites = {}
    for site in sites:
        changes = _take_changes(site, modules, biases)
        if changes:
            loaded[site.layer, site.site] = _load_site(site, changes, source)
    for name in (*modules, *biases):
        raise AdapterLoadError(f"the base has no linear module {name!r} to adapt")
    return loaded


def _take_changes(
    site: LoraSite, modules: dict[str, LoraModule], biases: dict[str, SavedTensor]
) -> list[_Change]:
    """Remove the site's modules and biases from both, and list them."""
    changes: list[_Change] = []
    out0 = 0
    for part in site.slices:
        module, bias = modules.pop(part.module, None), biases.pop(f"{part.module}.bias", None)
        if module is not None or bias is not None:
            changes.append(_Change(part, out0, module, bias))
        out0 += part.out_features
    return changes


def _load_site(site: LoraSite, changes: list[_Change], source: Source) -> SiteWeights:
    a = torch.empty(sum(c.lora_rank for c in changes), site.in_features, dtype=source.dtype)
    expands: list[Expand] = []
    scales = _Columns(site.out_features, 1.0)
    shifts = _Columns(site.out_features, 0.0)
    r0 = 0
    for change in changes:
        r1 = r0 + change.lora_rank
        vectors, scale, scaling = _vectors(change, source), None, 0.0
        if change.module is not None:
            scaling = change.module.scaling
            factor_a, factor_b = _factors(change.module, change.part, site.in_features, source)
            if vectors.magnitude is not None:
                out_features, name = change.part.out_features, change.part.module
                weight = source.base.rows(name, out_features, site.in_features)
                scale = dora_scale(weight, factor_a, factor_b, scaling, vectors.magnitude)
            a[r0:r1] = factor_a
            b = _scaled(factor_b, source.dtype, change.module, scale).T.contiguous()
            expands.append((r0, r1, change.columns.start, change.columns.stop, b))
        scales.put(change, scale)
        shifts.put(change, _shift(change, vectors, scale, scaling, source))
        r0 = r1
    return SiteWeights(a, tuple(expands), scales.whole, shifts.whole)


class _Columns:
    """A vector over a site's outputs, which is made when a module has its part of it."""

    def __init__(self, out_features: int, neutral: float) -> None:
        self.whole: Tensor | None = None
        self._out_features, self._neutral = out_features, neutral

    def put(self, change: _Change, values: Tensor | None) -> None:
        if values is None:
            return
        if not values.isfinite().all():
            raise AdapterLoadError(
                f"{change.part.module}: its scale or shift is not finite; a row of the weight and "
                "its change may add up to zero"
            )
        if self.whole is None:
            self.whole = torch.full((self._out_features,), self._neutral)
        self.whole[change.columns] = values


def _vectors(change: _Change, source: Source) -> SliceVectors:
    def read(name: str | None) -> Tensor | None:
        if name is None:
            return None
        shape = (change.part.out_features,)
        return source.tensor(name, shape, change.part.module).float()

    module, bias = change.module, change.bias
    return SliceVectors(
        magnitude=None if module is None else read(module.magnitude),
        bias=None if bias is None else read(bias.tensor),
        b_bias=None if module is None else read(module.lora_b_bias),
    )


def _shift(
    change: _Change, vectors: SliceVectors, scale: Tensor | None, scaling: float, source: Source
) -> Tensor | None:
    base_bias = None
    if vectors.bias is not None or scale is not None:
        base_bias = source.base.bias(change.part.module, change.part.out_features)
        if base_bias is None and vectors.bias is not None:
            raise AdapterLoadError(f"{change.part.module} of the base has no bias to replace")
    return slice_shift(vectors, base_bias, scale, scaling)


def _factors(
    module: LoraModule, part: LoraSlice, in_features: int, source: Source
) -> tuple[Tensor, Tensor]:
    """Read A [r, in] and B [out, r], from what the file has of them."""
    rank, asker = module.lora_rank, part.module
    if module.is_compact:
        if not module.fits(part.out_features, in_features):
            raise AdapterLoadError(
                f"{asker} of the base is {part.out_features} x {in_features}; the adapter's is "
                f"{module.out_features} x {module.in_features}"
            )
        a_shape, b_shape = stored_shapes(module)
        a = source.tensor(module.lora_a, a_shape, asker)
        b = source.tensor(module.lora_b, b_shape, asker)
        return whole_factors(module, a, b, in_features, source.dtype)
    a = source.tensor(module.lora_a, (rank, in_features), asker)
    return a, source.tensor(module.lora_b, (part.out_features, rank), asker)


def _scaled(b: Tensor, dtype: torch.dtype, module: LoraModule, scale: Tensor | None) -> Tensor:
    """Return B times the scaling, and DoRA's scale [out]; multiplied in float32."""
    wide = b if b.dtype == dtype and scale is None else b.float()
    scaled = wide * module.scaling
    if scale is not None:
        scaled *= scale[:, None]
    scaled = scaled.to(dtype)
    if not scaled.abs().max().isfinite():  # max() keeps NaN; 20x faster than isfinite().all()
        raise AdapterLoadError(
            f"{module.lora_b}: not finite in {dtype} at scaling {module.scaling}"
        )
    return scaled
