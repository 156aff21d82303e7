"""Computes the scale and shift that an adapter applies to a linear layer's output.

With the base's y0 = W x + b and an adapter's A, B, scaling s, DoRA's magnitude m, a replaced bias
b' and a bias c behind B, PEFT computes

    plain   y = W x + b' + s (B A x + c)
    DoRA    y = n (W x + s B A x) + b'        n = m / ||W + s B A||, of each row

so that y = n y0 + (b' - n b + s c) + n s B A x, with n = 1 where there is no DoRA.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SliceVectors:
    """One module's vectors [out] as stored, in float32; None: the adapter has none."""

    magnitude: Tensor | None = None
    bias: Tensor | None = None
    b_bias: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self.magnitude is None and self.bias is None and self.b_bias is None


def dora_scale(
    weight: Iterable[Tensor], a: Tensor, b: Tensor, scaling: float, magnitude: Tensor
) -> Tensor:
    """Compute magnitude / ||W + scaling B A|| of each row, in float32: A [r, in], B [out, r].

    `weight` yields W in blocks of rows, in order.
    """
    a, b = a.float(), b.float()
    norms: list[Tensor] = []
    start = 0
    for rows in weight:
        changed = torch.addmm(rows, b[start : start + len(rows)], a, alpha=scaling)
        norms.append(torch.linalg.vector_norm(changed, dim=1))
        start += len(rows)
    return magnitude / torch.cat(norms)


def slice_shift(
    vectors: SliceVectors, base_bias: Tensor | None, scale: Tensor | None, scaling: float
) -> Tensor | None:
    """Compute b' - n b + s c; None if it is 0 everywhere, because nothing changes it."""
    shift: Tensor | None = None
    if base_bias is not None and (scale is not None or vectors.bias is not None):
        own = base_bias if vectors.bias is None else vectors.bias
        shift = own - (base_bias if scale is None else scale * base_bias)
    if vectors.b_bias is not None:
        added = scaling * vectors.b_bias
        shift = added if shift is None else shift + added
    return shift
