"""From a verified PEFT folder to LoraWeights: the factors of every site, in kernel layout.

Layout: A as [R, in] and B, with the scaling folded in, either rank-major as [R, out] (the
transpose of PEFT's) or in panels of columns. Modules that read the same input (q, k, v; gate, up)
share one site and its A.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from adapter_store.errors import AdapterStoreError
from adapter_store.manifest import LoraModule, read_lora_layout
from engine.backends.native.memory import ALIGNMENT, separate_bytes
from engine.messages import AdapterFolder
from engine.model.decoder import LoraSite
from engine.model.layers import LoraSlice

# rank_major: B [r, out], what torch multiplies with
# panels:     B [ceil(out / 32), ceil(r / 2), 32, 2], neighbouring ranks of neighbouring columns
#             side by side, padded with zeros; what the native kernels multiply with
BLayout = Literal["rank_major", "panels"]
PANEL = 32


LARGE = 4 * 2**20  # bytes from which an adapter has huge pages of its own

Site = tuple[int, str]  # (layer, site)


class AdapterLoadError(ValueError):
    """The adapter cannot be applied to this base; the message names the module and the reason."""


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """Rows [r0, r1) of `a` and the matching B write output columns [out0, out1)."""

    a: torch.Tensor  # [R, in]
    expands: tuple[tuple[int, int, int, int, torch.Tensor], ...]  # (r0, r1, out0, out1, B)

    def to(self, device: torch.device) -> "SiteWeights":
        expands = tuple((*e[:4], e[4].to(device, non_blocking=True)) for e in self.expands)
        return SiteWeights(self.a.to(device, non_blocking=True), expands)

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + sum(b.nbytes for *_, b in self.expands)


Sites = dict[Site, SiteWeights]


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter, each site at its own rank; sites that it does not target are absent."""

    digest: str
    sites: Sites
    nbytes: int  # as held, padding included
    b_layout: BLayout = "rank_major"

    def to(self, device: torch.device) -> "LoraWeights":
        if device.type == "cpu":
            return self
        return replace(self, sites={k: s.to(device) for k, s in self.sites.items()})


def load_lora(
    adapter: AdapterFolder,
    sites: Sequence[LoraSite],
    dtype: torch.dtype,
    *,
    b_layout: BLayout = "rank_major",
) -> LoraWeights:
    """Read and lay out an adapter. Raises AdapterLoadError."""
    folder = Path(adapter.path)
    try:
        layout = read_lora_layout(folder)
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            loaded = _load_sites(dict(layout.modules), sites, file, dtype, b_layout)
    except (AdapterStoreError, SafetensorError, OSError) as error:
        raise AdapterLoadError(f"adapter {adapter.digest}: {error}") from error
    nbytes = sum(s.nbytes for s in loaded.values())
    if b_layout == "panels" and nbytes >= LARGE:
        loaded, nbytes = _in_one_piece(loaded)
    return LoraWeights(adapter.digest, loaded, nbytes, b_layout)


def panels(b: torch.Tensor) -> torch.Tensor:
    """B [out, r] in panels [ceil(out / 32), ceil(r / 2), 32, 2]; 2-byte dtypes only."""
    if b.shape[1] % 2 or b.shape[0] % PANEL:
        b = torch.nn.functional.pad(b, (0, b.shape[1] % 2, 0, -b.shape[0] % PANEL))
    pairs = b.contiguous().view(torch.int32)  # transposing words is what torch is fast at
    by_pair = pairs.T.contiguous().view(pairs.shape[1], -1, PANEL)
    return by_pair.transpose(0, 1).contiguous().view(b.dtype).unflatten(2, (PANEL, 2))


def _load_sites(
    modules: dict[str, LoraModule],
    sites: Sequence[LoraSite],
    file: safe_open,
    dtype: torch.dtype,
    b_layout: BLayout,
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
            loaded[site.layer, site.site] = _load_site(site, adapted, file, dtype, b_layout)
    if modules:
        raise AdapterLoadError(f"the base has no linear module {next(iter(modules))!r} to adapt")
    return loaded


def _load_site(
    site: LoraSite,
    adapted: list[tuple[LoraModule, LoraSlice, int]],  # each with its first output column
    file: safe_open,
    dtype: torch.dtype,
    b_layout: BLayout,
) -> SiteWeights:
    a = torch.empty(sum(m.lora_rank for m, *_ in adapted), site.in_features, dtype=dtype)
    expands: list[tuple[int, int, int, int, torch.Tensor]] = []
    r0 = 0
    for module, part, out0 in adapted:
        r1 = r0 + module.lora_rank
        factor_a, factor_b = _factors(module, part, site.in_features, file)
        a[r0:r1] = factor_a
        b = _scaled(factor_b, dtype, module)
        b = panels(b) if b_layout == "panels" else b.T.contiguous()
        expands.append((r0, r1, out0, out0 + part.out_features, b))
        r0 = r1
    return SiteWeights(a, tuple(expands))


def _factors(
    module: LoraModule, part: LoraSlice, in_features: int, file: safe_open
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] as they are in the file."""
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
    """B times the scaling, multiplied in float32 (as torch does for bfloat16 too)."""
    wide = b if b.dtype == dtype else b.float()
    scaled = (wide * module.scaling).to(dtype)
    if not scaled.abs().max().isfinite():  # NaN is the largest of all; 20 times isfinite().all()
        raise AdapterLoadError(
            f"{module.lora_b}: not finite in {dtype} at scaling {module.scaling}"
        )
    return scaled


def _in_one_piece(sites: Sites) -> tuple[Sites, int]:
    """Copies in huge pages, in the order in which a step reads them; and the bytes they take."""
    tensors = [t for s in sites.values() for t in (s.a, *(e[4] for e in s.expands))]
    sizes = [-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors]
    block = separate_bytes(sum(sizes))
    pieces = iter(block[: sum(sizes)].split(sizes))

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        piece = next(pieces)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return piece.copy_(tensor)

    copies = {
        key: SiteWeights(moved(site.a), tuple((*e[:4], moved(e[4])) for e in site.expands))
        for key, site in sites.items()
    }
    return copies, block.nbytes
