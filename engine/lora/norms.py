"""Loads the norms that an adapter replaces."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adapter_store.layout import SavedTensor
from engine.lora.source import Source
from engine.lora.weights import AdapterLoadError


def load_norms(replaced: Mapping[str, SavedTensor], source: Source) -> dict[str, Tensor]:
    """Load norms by their modules' names, in the form that RmsNorm keeps its weight in.

    Raises AdapterLoadError for what is no norm of the base.
    """
    norms: dict[str, Tensor] = {}
    for name, saved in replaced.items():
        module = name.removesuffix(".weight")
        width, offset = source.base.norm_width(module), source.base.spec.norm_offset
        if width is None:
            raise AdapterLoadError(
                f"{saved.tensor} replaces {module}, which is no norm of the base"
            )
        shifted = source.tensor(saved.tensor, (width,), module).float() + offset
        norms[module] = shifted.to(torch.float32 if offset else source.dtype)
        if not norms[module].isfinite().all():
            raise AdapterLoadError(f"{saved.tensor} is not finite in {norms[module].dtype}")
    return norms
