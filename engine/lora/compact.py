"""Makes plain A and B of what QALoRA and BD-LoRA store, which give the same products.

QALoRA averages the inputs in groups of g and multiplies the averages by their number, in / g: A's
column of a group becomes g equal columns, each times in / g / g. BD-LoRA's blocks are put on a
diagonal. Kernels then see an adapter like any other.
"""

import torch
from torch import Tensor

from adapter_store.layout import LoraModule
from engine.lora.weights import AdapterLoadError


def stored_shapes(module: LoraModule) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B in the file."""
    rank = module.lora_rank
    a = rank, module.in_features // (module.a_blocks or 1)
    return a, (module.out_features, rank // (module.b_blocks or 1))


def whole_factors(
    module: LoraModule, a: Tensor, b: Tensor, in_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r], which the model then has in `dtype`.

    Raises AdapterLoadError if A is not finite in it.
    Where A has `in_features` already it stays: on a layer that is not GPTQ's PEFT averages nothing.
    """
    if module.a_blocks is not None:
        a = torch.block_diag(*a.chunk(module.a_blocks))
    if module.b_blocks is not None:
        b = torch.block_diag(*b.chunk(module.b_blocks))
    if module.group_size is not None and module.in_features != in_features:
        factor = module.in_features / module.group_size
        a = (a.float() * factor).to(dtype)
        if not a.abs().max().isfinite():
            raise AdapterLoadError(f"{module.lora_a}: not finite in {dtype} at {factor} times")
        a = a.repeat_interleave(module.group_size, dim=1)
    return a, b
