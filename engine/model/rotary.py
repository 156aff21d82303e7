"""RoPE: computes the angles by which positions rotate pairs of dimensions, with their scalings.

A scaling holds parameters and computes frequencies. Scalings that depend on the sequence's length
use the longest length to be served and never change: keys in the KV cache must stay valid when a
sequence grows. Reads no config: `rope_keys` does.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Scaling(Protocol):
    """How a checkpoint changes the angles that it was first trained with."""

    def frequencies(self, dim: int, theta: float) -> Tensor:
        """Return radians per position, float32 [dim / 2]."""
        ...

    def amplitude(self) -> float:
        """Return the factor on cosine and sine."""
        ...


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary settings of a layer: the first `dim` dimensions of each head are rotated."""

    dim: int
    theta: float
    scaling: Scaling


class RotaryTable(nn.Module):
    """Holds cosines and sines of all positions below `max_len`, computed once in float32.

    The sine's first half is negated, so that a rotation is x * cos + roll(x, dim / 2) * sin.
    """

    def __init__(
        self, rotary: Rotary, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        frequencies = rotary.scaling.frequencies(rotary.dim, rotary.theta)
        angles = torch.arange(max_len, dtype=torch.float32)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        amplitude = rotary.scaling.amplitude()
        self.cos = (torch.cat([cos, cos], -1) * amplitude).to(device, dtype)  # [max_len, dim]
        self.sin = (torch.cat([-sin, sin], -1) * amplitude).to(device, dtype)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[positions], self.sin[positions]


def plain_frequencies(dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


# ==== Scalings ====


@dataclass(frozen=True, slots=True)
class Unscaled:
    def frequencies(self, dim: int, theta: float) -> Tensor:
        return plain_frequencies(dim, theta)

    def amplitude(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Divides positions by a factor."""

    factor: float

    def frequencies(self, dim: int, theta: float) -> Tensor:
        return plain_frequencies(dim, theta) / self.factor

    def amplitude(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class Dynamic:
    """Uses a larger base if sequences are longer than the trained length."""

    factor: float
    trained_len: int
    served_len: int

    def frequencies(self, dim: int, theta: float) -> Tensor:
        length = max(self.served_len, self.trained_len)
        stretch = self.factor * length / self.trained_len - (self.factor - 1)
        return plain_frequencies(dim, theta * stretch ** (dim / (dim - 2)))

    def amplitude(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class Llama3:
    """Divides slow frequencies, keeps fast ones and blends those in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    trained_len: int

    def frequencies(self, dim: int, theta: float) -> Tensor:
        plain = plain_frequencies(dim, theta)
        turns = self.trained_len * plain / (2 * math.pi)  # within the trained length
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(plain / self.factor, plain, kept.clamp(0.0, 1.0))

    def amplitude(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class Yarn:
    """Divides frequencies with fewer than `beta_slow` turns, keeps those above `beta_fast`.

    Turns are counted over the trained length; dimensions in between are blended.
    """

    factor: float
    trained_len: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float

    def frequencies(self, dim: int, theta: float) -> Tensor:
        plain = plain_frequencies(dim, theta)
        low, high = self._blended_dimensions(dim, theta)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)
        return torch.lerp(plain, plain / self.factor, ramp.clamp(0.0, 1.0))

    def _blended_dimensions(self, dim: int, theta: float) -> tuple[float, float]:
        def dimension_that_turns(times: float) -> float:
            return dim * math.log(self.trained_len / (times * 2 * math.pi)) / (2 * math.log(theta))

        low = dimension_that_turns(self.beta_fast)
        high = dimension_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        return low, high if high != low else high + 0.001  # avoids a division by zero

    def amplitude(self) -> float:
        return self.attention_factor


@dataclass(frozen=True, slots=True)
class LongRope:
    """Divides each dimension by its own factor, from the short or the long list, chosen once."""

    factors: tuple[float, ...]
    attention_factor: float

    def frequencies(self, dim: int, theta: float) -> Tensor:
        return plain_frequencies(dim, theta) / torch.tensor(self.factors, dtype=torch.float32)

    def amplitude(self) -> float:
        return self.attention_factor
