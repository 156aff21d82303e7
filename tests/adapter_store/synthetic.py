"""Make adapters of random bytes, for tests that do not read tensors. Imports no torch."""

import hashlib

import numpy as np

from adapter_store.layout import WEIGHTS_NAME, LoraModule
from adapter_store.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    AdapterManifest,
    FileEntry,
    adapter_digest,
)

BASE = "ba5e" * 16


def synthetic(seed: int, nbytes: int = 100) -> tuple[AdapterManifest, dict[str, bytes]]:
    """Make a consistent manifest and the files it describes."""
    content = np.random.default_rng(seed).bytes(nbytes)
    files = {CONFIG_NAME: b"{}", WEIGHTS_NAME: content}
    entries = {
        name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()
    }
    module = LoraModule(4, 2.0, 8, 8, "F32", "a", "b")
    manifest = AdapterManifest(
        digest=adapter_digest(BASE, entries),
        base=BASE,
        lora_rank=4,
        num_parameters=64,
        nbytes=sum(len(data) for data in files.values()),
        files=entries,
        modules={"model.layers.0.self_attn.q_proj": module},
    )
    return manifest, files | {MANIFEST_NAME: manifest.to_json()}
