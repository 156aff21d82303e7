"""Reads a verified PEFT folder as LoraWeights: the factors of every site.

A is [R, in], and B is rank-major, [r, out], the transpose of PEFT's, with the scaling folded in.
Modules that read the same input (q, k, v; gate, up) share one site and its A. If a
backend needs another layout, its `pack_adapter` makes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from adapter_store.errors import AdapterStoreError
from adapter_store.manifest import LoraModule, read_lora_layout
from engine.lora.overlay import Overlay
from engine.messages import AdapterFolder
from engine.model.checkpoint import PREFIX
from engine.model.decoder import LoraSite
from engine.model.layers import LoraSlice

Site = tuple[int, str]  # (layer, site)
Expand = tuple[int, int, int, int, torch.Tensor]  # (r0, r1, out0, out1, B)


class AdapterLoadError(ValueError):
    """The adapter cannot be applied to this base; the message names the module and the reason."""


class AdapterUnreadable(Exception):
    """The files are not those that were verified, or cannot be read; the message is for the log."""


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """What an adapter makes of a site's output y: y * scale + shift + (x A^T) B.

    Rows [r0, r1) of `a` and their B give output columns [out0, out1). `scale` and `shift` are
    float32 over all outputs of the site, 1 and 0 where the adapter has none. A site may have them
    and no factors: then `a` is [0, in].
    """

    a: torch.Tensor  # [R, in]
    expands: tuple[Expand, ...]
    scale: torch.Tensor | None = None  # [out]; None: 1 everywhere
    shift: torch.Tensor | None = None  # [out]; None: 0 everywhere

    def to(self, device: torch.device) -> "SiteWeights":
        expands = tuple((*e[:4], e[4].to(device, non_blocking=True)) for e in self.expands)
        scale, shift = (
            None if t is None else t.to(device, non_blocking=True) for t in (self.scale, self.shift)
        )
        return SiteWeights(self.a.to(device, non_blocking=True), expands, scale, shift)

    @property
    def nbytes(self) -> int:
        affine = sum(t.nbytes for t in (self.scale, self.shift) if t is not None)
        return self.a.nbytes + sum(b.nbytes for *_, b in self.expands) + affine


Sites = dict[Site, SiteWeights]


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter, each site at its own rank; what it does not change is absent.

    `norms` are whole weights, by the module's name (model.layers.0.input_layernorm), in the form
    that RmsNorm keeps: with the model's offset added, in float32 if there is one.
    """

    digest: str
    sites: Sites
    nbytes: int
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    embedding: Overlay | None = None
    head: Overlay | None = None

    def to(self, device: torch.device) -> "LoraWeights":
        if device.type == "cpu":
            return self
        return replace(
            self,
            sites={key: site.to(device) for key, site in self.sites.items()},
            norms={name: norm.to(device) for name, norm in self.norms.items()},
            embedding=None if self.embedding is None else self.embedding.to(device),
            head=None if self.head is None else self.head.to(device),
        )


def load_lora(
    adapter_folder: AdapterFolder, sites: Sequence[LoraSite], dtype: torch.dtype
) -> LoraWeights:
    """Read an adapter. Raises AdapterLoadError, AdapterUnreadable."""
    folder = Path(adapter_folder.path)
    try:
        layout = read_lora_layout(folder)
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            modules = {_whole_name(name): module for name, module in layout.modules.items()}
            loaded = _load_sites(modules, sites, file, dtype)
    except (AdapterStoreError, SafetensorError, OSError) as error:
        raise AdapterUnreadable(f"adapter {adapter_folder.digest}: {error}") from error
    return LoraWeights(adapter_folder.digest, loaded, sum(s.nbytes for s in loaded.values()))


def _whole_name(module: str) -> str:
    """Name a module as the decoder does, also one of a model without an output layer."""
    return f"{PREFIX}{module}" if module.startswith("layers.") else module


def _load_sites(
    modules: dict[str, LoraModule],
    sites: Sequence[LoraSite],
    file: safe_open,
    dtype: torch.dtype,
) -> Sites:
    loaded: Sites = {}
    for site in sites:
        adapted: list[tuple[LoraModule, LoraSlice, int]] = []
        out0 = 0
        for part in site.slices:
            module = modules.pop(part.module, None)
            if module is not None:
                adapted.append((module, part, out0))
            out0 += part.out_features
        if adapted:
            loaded[site.layer, site.site] = _load_site(site, adapted, file, dtype)
    if modules:
        raise AdapterLoadError(f"the base has no linear module {next(iter(modules))!r} to adapt")
    return loaded


def _load_site(
    site: LoraSite,
    adapted: list[tuple[LoraModule, LoraSlice, int]],  # each with its first output column
    file: safe_open,
    dtype: torch.dtype,
) -> SiteWeights:
    a = torch.empty(sum(m.lora_rank for m, *_ in adapted), site.in_features, dtype=dtype)
    expands: list[Expand] = []
    r0 = 0
    for module, part, out0 in adapted:
        r1 = r0 + module.lora_rank
        factor_a, factor_b = _factors(module, part, site.in_features, file)
        a[r0:r1] = factor_a
        b = _scaled(factor_b, dtype, module).T.contiguous()
        expands.append((r0, r1, out0, out0 + part.out_features, b))
        r0 = r1
    return SiteWeights(a, tuple(expands))


def _factors(
    module: LoraModule, part: LoraSlice, in_features: int, file: safe_open
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read A [r, in] and B [out, r] as stored in the file."""
    a, b = file.get_tensor(module.lora_a), file.get_tensor(module.lora_b)
    if a.shape != (module.lora_rank, in_features) or b.shape != (
        part.out_features,
        module.lora_rank,
    ):
        raise AdapterLoadError(
            f"{part.module}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a layer of "
            f"{in_features} inputs and {part.out_features} outputs at rank {module.lora_rank}"
        )
    return a, b


def _scaled(b: torch.Tensor, dtype: torch.dtype, module: LoraModule) -> torch.Tensor:
    """Return B times the scaling, multiplied in float32 (as torch does for bfloat16 too)."""
    wide = b if b.dtype == dtype else b.float()
    scaled = (wide * module.scaling).to(dtype)
    if not scaled.abs().max().isfinite():  # max() keeps NaN; 20x faster than isfinite().all()
        raise AdapterLoadError(
            f"{module.lora_b}: not finite in {dtype} at scaling {module.scaling}"
        )
    return scaled
