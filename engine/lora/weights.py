"""From a verified PEFT folder to LoraWeights: the factors of every site, in kernel layout.

Layout: A as [R, in] and B rank-major as [R, out] (the transpose of PEFT's), with the scaling
folded into B. Modules that read the same input (q, k, v; gate, up) share one site and its A.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from adapter_store.errors import AdapterStoreError
from adapter_store.manifest import LoraModule, read_lora_layout
from engine.messages import AdapterFolder
from engine.model.decoder import LoraSite


class AdapterLoadError(ValueError):
    """The adapter cannot be applied to this base; the message names the module and the reason."""


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """Rows [r0, r1) of `a` and the matching B write output columns [out0, out1)."""

    a: torch.Tensor  # [R, in]
    expands: tuple[tuple[int, int, int, int, torch.Tensor], ...]  # (r0, r1, out0, out1, B [r, out])

    def to(self, device: torch.device) -> "SiteWeights":
        expands = tuple((*e[:4], e[4].to(device, non_blocking=True)) for e in self.expands)
        return SiteWeights(self.a.to(device, non_blocking=True), expands)

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + sum(b.nbytes for *_, b in self.expands)


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter, each site at its own rank; sites that it does not target are absent."""

    digest: str
    sites: dict[tuple[int, str], SiteWeights]
    nbytes: int

    def to(self, device: torch.device) -> "LoraWeights":
        if device.type == "cpu":
            return self
        return replace(self, sites={k: s.to(device) for k, s in self.sites.items()})


def load_lora(
    adapter: AdapterFolder, sites: Sequence[LoraSite], dtype: torch.dtype, *, pin: bool = False
) -> LoraWeights:
    """Read and lay out an adapter. Raises AdapterLoadError; `pin` page-locks for fast copies."""
    folder = Path(adapter.path)
    try:
        layout = read_lora_layout(folder)
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            loaded = _load_sites(dict(layout.modules), sites, file, dtype)
    except (AdapterStoreError, SafetensorError, OSError) as error:
        raise AdapterLoadError(f"adapter {adapter.digest}: {error}") from error
    if pin:
        loaded = {key: _pinned(site) for key, site in loaded.items()}
    return LoraWeights(adapter.digest, loaded, sum(s.nbytes for s in loaded.values()))


def _load_sites(
    modules: dict[str, LoraModule], sites: Sequence[LoraSite], file: safe_open, dtype: torch.dtype
) -> dict[tuple[int, str], SiteWeights]:
    loaded: dict[tuple[int, str], SiteWeights] = {}
    for site in sites:
        rows: list[torch.Tensor] = []
        expands: list[tuple[int, int, int, int, torch.Tensor]] = []
        r0 = out0 = 0
        for part in site.slices:
            module = modules.pop(part.module, None)
            if module is not None:
                a, b = _factors(module, part.module, site.in_features, part.out_features, file)
                rows.append(a.to(dtype))
                r1 = r0 + a.shape[0]
                expands.append((r0, r1, out0, out0 + part.out_features, _cast(b, dtype, module)))
                r0 = r1
            out0 += part.out_features
        if rows:
            loaded[site.layer, site.site] = SiteWeights(torch.cat(rows), tuple(expands))
    if modules:
        raise AdapterLoadError(f"the base has no linear module {next(iter(modules))!r} to adapt")
    return loaded


def _factors(
    module: LoraModule, name: str, in_features: int, out_features: int, file: safe_open
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and scaled B [r, out], both float32."""
    a, b = file.get_tensor(module.lora_a).float(), file.get_tensor(module.lora_b).float()
    if a.shape != (module.lora_rank, in_features) or b.shape != (out_features, module.lora_rank):
        raise AdapterLoadError(
            f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a layer of "
            f"{in_features} inputs and {out_features} outputs at rank {module.lora_rank}"
        )
    return a, (b.T * module.scaling).contiguous()


def _cast(b: torch.Tensor, dtype: torch.dtype, module: LoraModule) -> torch.Tensor:
    b = b.to(dtype)
    if not torch.isfinite(b).all():
        raise AdapterLoadError(
            f"{module.lora_b}: not finite in {dtype} at scaling {module.scaling}"
        )
    return b


def _pinned(site: SiteWeights) -> SiteWeights:
    expands = tuple((*e[:4], e[4].pin_memory()) for e in site.expands)
    return SiteWeights(site.a.pin_memory(), expands)
