"""Reads a verified PEFT folder as LoraWeights.

A is [R, in], and B is rank-major, [r, out], the transpose of PEFT's, with the scaling folded in.
Modules that read the same input (q, k, v; gate, up) share one site and its A. If a backend needs
another layout, its `pack_adapter` makes it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from adapter_store.errors import AdapterStoreError
from adapter_store.layout import WEIGHTS_NAME, read_lora_layout
from engine.lora.sites import load_sites
from engine.lora.source import OpenBase, Source
from engine.lora.weights import AdapterUnreadable, LoraWeights
from engine.messages import AdapterFolder
from engine.model.layers import LoraSite


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
            loaded = load_sites(layout, sites, source)
    except (AdapterStoreError, SafetensorError, OSError) as error:
        raise AdapterUnreadable(f"adapter {adapter_folder.digest}: {error}") from error
    return LoraWeights(
        adapter_folder.digest,
        loaded,
        sum(s.nbytes for s in loaded.values()),
        invocation_token_ids=layout.invocation_token_ids,
    )
