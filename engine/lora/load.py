"""Reads a verified PEFT folder as LoraWeights.

A is [R, in], and B is rank-major, [r, out], the transpose of PEFT's, with the scaling folded in.
Modules that read the same input (q, k, v; gate, up) share one site and its A. If a backend needs
another layout, its `pack_adapter` makes it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open

from adapter_store.errors import AdapterStoreError
from adapter_store.layout import WEIGHTS_NAME, LoraLayout, read_lora_layout
from engine.lora.norms import load_norms
from engine.lora.sites import load_sites
from engine.lora.source import OpenBase, Source
from engine.lora.vocabulary import EMBEDDING, HEAD, load_vocabulary
from engine.lora.weights import AdapterUnreadable, LoraWeights
from engine.messages import AdapterFolder
from engine.model.checkpoint import PREFIX
from engine.model.layers import LoraSite

Change = TypeVar("Change")


def load_lora(
    adapter_folder: AdapterFolder,
    sites: Sequence[LoraSite],
    dtype: torch.dtype,
    open_base: OpenBase | None = None,
) -> LoraWeights:
    """Read an adapter. Raises AdapterLoadError, AdapterUnreadable, ModelError.

    `open_base` must be given for adapters that depend on the base's own weights.
    """
    folder = Path(adapter_folder.path)
    try:
        layout = read_lora_layout(folder)
        with ExitStack() as opened:
            file = opened.enter_context(safe_open(folder / WEIGHTS_NAME, framework="pt"))
            source = Source(file, dtype, open_base, opened)
            return _load(adapter_folder.digest, layout, sites, source)
    except (AdapterStoreError, SafetensorError, OSError) as error:
        raise AdapterUnreadable(f"adapter {adapter_folder.digest}: {error}") from error


def _load(
    digest: str, layout: LoraLayout, sites: Sequence[LoraSite], source: Source
) -> LoraWeights:
    modules, replaced = _named(layout.modules), _named(layout.replaced)
    embedding, head = load_vocabulary(modules, replaced, _named(layout.token_rows), source)
    for name in (EMBEDDING, HEAD):
        modules.pop(name, None)
        replaced.pop(f"{name}.weight", None)
    biases = {name: saved for name, saved in replaced.items() if name.endswith(".bias")}
    norms = load_norms({n: s for n, s in replaced.items() if n not in biases}, source)
    loaded = load_sites(modules, biases, sites, source)
    nbytes = sum(site.nbytes for site in loaded.values())
    nbytes += sum(norm.nbytes for norm in norms.values())
    nbytes += sum(overlay.nbytes for overlay in (embedding, head) if overlay is not None)
    return LoraWeights(digest, loaded, nbytes, norms, embedding, head, layout.invocation_token_ids)


def _named(changes: Mapping[str, Change]) -> dict[str, Change]:
    """Name modules and parameters as the decoder does, also of a model without an output layer."""
    return {
        name if name.startswith((PREFIX, HEAD)) else f"{PREFIX}{name}": change
        for name, change in changes.items()
    }
