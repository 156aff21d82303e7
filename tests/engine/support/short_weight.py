"""Makes int8 weights that are stored in four bits."""

import torch

from engine.model.quantized_weight import QuantizedWeight


def short_weight(out_features: int, in_features: int) -> QuantizedWeight:
    """Make random codes and multipliers, the largest and negative ones among them."""
    generator = torch.Generator().manual_seed(in_features)
    shape = out_features, in_features // 32
    return QuantizedWeight(
        "int4",
        torch.randint(
            0, 256, (out_features, in_features // 2), generator=generator, dtype=torch.uint8
        ),
        torch.rand(out_features, 1, generator=generator) + 0.01,
        32,
        multipliers=torch.randint(-15, 16, shape, generator=generator, dtype=torch.int8),
    )
