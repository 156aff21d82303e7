"""Multiplies NF4 weights by bitsandbytes' kernel, for few rows on devices where that is faster.

That kernel reads the codes of an output one after the other, the even input in the high half of a
byte: it needs its own copy, in addition to that of the kernels here. `crossovers` holds the
measurements.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from engine.model.quantized_weight import QuantizedWeight

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def takes(weight: QuantizedWeight, device: torch.device) -> bool:
    """Whether bitsandbytes is installed and has a kernel for this weight on this device."""
    return (
        device.type == "cuda"
        and weight.format == "nf4"
        and weight.input_order is None
        and weight.group_size in BLOCK_SIZES
        and importlib.util.find_spec("bitsandbytes") is not None
    )


def pack(
    weight: QuantizedWeight, bias: Tensor | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return a function x [N, in] -> x W^T + bias [N, out]; x, `bias` and result have one dtype.

    On a CPU bitsandbytes uses its fallback, which is slow and for tests.
    """
    import bitsandbytes  # noqa: F401  (registers the op)

    codes = weight.codes.to(device)
    high_first = (codes << 4 | codes >> 4).flatten().unsqueeze(1)
    scales = weight.scales.to(device, torch.float32).flatten()
    shape = [weight.out_features, weight.in_features]
    gemm = torch.ops.bitsandbytes.gemm_4bit.default

    def multiply(x: Tensor) -> Tensor:
        return gemm(x, high_first, shape, scales, weight.group_size, "nf4", bias)

    return multiply
