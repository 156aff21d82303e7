"""Chooses the formats of weights where the configuration says auto."""

from pathlib import Path

import torch

from engine.model.families import read_dtype, read_scheme


def own_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of auto: float32 stays float32, any other is computed in bfloat16."""
    return torch.float32 if read_dtype(folder) == torch.float32 else torch.bfloat16


def auto_quantization(folder: Path, dtype: torch.dtype, device: torch.device) -> str:
    """Choose the fastest format whose answers are those of the model's own. Raises ModelError.

    On a CPU that is int8, with every instruction set: nf4 and int4 decode faster, but nf4 computes
    prompts more slowly, and they have changed perplexity by one and two percent. The choice is no
    measurement, so that all replicas of a model have one format.
    """
    is_gain = device.type == "cpu" and dtype == torch.bfloat16 and read_scheme(folder) is None
    return "int8" if is_gain else "none"


def auto_output_layer(weight_format: str, dtype: torch.dtype) -> str:
    """Choose the output layer of a CPU: int8 beside linear layers that are quantized."""
    is_gain = weight_format not in ("none", "fp8") and dtype == torch.bfloat16
    return "int8" if is_gain else "model"
