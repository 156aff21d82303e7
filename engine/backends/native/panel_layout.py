"""The layout of B in panels of 32 columns.

A panel is [ceil(r / 2), 32, 2]: neighbouring ranks of neighbouring columns side by side, padded
with zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.native.memory import separate_bytes

PANEL = 32
LARGE = 4 * 2**20  # bytes; what is at least this large has its own huge pages


def in_panels(b: Tensor, space: Tensor | None = None) -> Tensor:
    """Write B [r, out], of 2 bytes a value, as panels to this memory, or to new memory.

    Moves words that hold two ranks each, which torch does faster than single values.
    """
    num_panels, num_pairs = panels_of(b)
    if space is None:
        space = _new_bytes(panel_bytes(b))
    halves = _padded(b).view(torch.uint16)
    words = halves[1::2].int().bitwise_left_shift_(16).bitwise_or_(halves[::2].int())
    by_panel = words.view(num_pairs, num_panels, PANEL).transpose(0, 1)
    space.view(torch.int32).view(by_panel.shape).copy_(by_panel)
    return space.view(b.dtype).view(*by_panel.shape, 2)


def _padded(b: Tensor) -> Tensor:
    ranks, width = b.shape
    is_whole = ranks % 2 == 0 and width % PANEL == 0
    return b if is_whole else F.pad(b, (0, -width % PANEL, 0, ranks % 2))


def panels_of(b: Tensor) -> tuple[int, int]:
    """Return the number of panels of B [r, out], and of pairs of ranks in each."""
    ranks, width = b.shape
    return -(-width // PANEL), -(-ranks // 2)


def panel_bytes(b: Tensor) -> int:
    num_panels, num_pairs = panels_of(b)
    return num_panels * num_pairs * PANEL * 2 * b.itemsize


def _new_bytes(nbytes: int) -> Tensor:
    if nbytes < LARGE:
        return torch.empty(nbytes, dtype=torch.uint8)
    return separate_bytes(nbytes)[:nbytes]
