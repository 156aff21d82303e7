"""The leaves of the decoder: embedding, linear and norm, each with the weights it expects.

A leaf names the checkpoint tensors that it wants (`parts`) and how each is stored; it opens no
file. Memory for a weight is taken when its first part arrives, and a linear layer is packed
into the form that its op wants as soon as its last part is there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels.dispatch import Ops
from engine.kernels.inputs import ForwardInputs


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor: its key, its shape, and what to do with it."""

    key: str
    shape: tuple[int, ...]
    store: Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class LoraSlice:
    """One module of the checkpoint, as an adapter names it, and its rows of a fused layer."""

    module: str
    out_features: int


@dataclass(frozen=True, slots=True)
class LoraSite:
    """A linear layer that adapters may add to: its slices lie one after another in its output."""

    layer: int
    site: str  # qkv, o, gate_up or down
    in_features: int
    slices: tuple[LoraSlice, ...]

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.slices)


@dataclass(frozen=True, slots=True)
class Build:
    """What every leaf is built with."""

    ops: Ops
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class Linear(nn.Module):
    """y = x W^T + b, plus each row's adapter. The weight is whatever the op packed."""

    def __init__(self, build: Build, place: LoraSite, bias: bool) -> None:
        super().__init__()
        self.place = place
        self.layer, self.site = place.layer, place.site
        self.multiply: Callable[[Tensor], Tensor] = _not_loaded
        self._build = build
        self._weight: Tensor | None = None
        self._bias = build.empty(place.out_features) if bias else None
        self._pending = len(place.slices) * (2 if bias else 1)

    def forward(self, x: Tensor, inputs: ForwardInputs) -> Tensor:
        y = self.multiply(x)
        if inputs.lora is not None:
            inputs.lora.add(self.layer, self.site, x, y)
        return y

    def parts(self) -> Iterator[Part]:
        start = 0
        for part in self.place.slices:
            rows = slice(start, start + part.out_features)
            shape = (part.out_features, self.place.in_features)
            yield Part(f"{part.module}.weight", shape, self._weight_rows(rows))
            if self._bias is not None:
                yield Part(f"{part.module}.bias", shape[:1], self._bias_rows(rows))
            start = rows.stop

    def _weight_rows(self, rows: slice) -> Callable[[Tensor], None]:
        def store(tensor: Tensor) -> None:
            if self._weight is None:
                self._weight = self._build.empty(self.place.out_features, self.place.in_features)
            self._weight[rows] = tensor
            self._arrived()

        return store

    def _bias_rows(self, rows: slice) -> Callable[[Tensor], None]:
        def store(tensor: Tensor) -> None:
            assert self._bias is not None
            self._bias[rows] = tensor
            self._arrived()

        return store

    def _arrived(self) -> None:
        self._pending -= 1
        if self._pending == 0:
            assert self._weight is not None
            self.multiply = self._build.ops.pack_linear(self._weight, self._bias)
            self._weight = self._bias = None


class Embedding(nn.Module):
    """Rows of a matrix by token id, times a scale, rounded to the weights' dtype as it is used."""

    def __init__(self, build: Build, key: str, vocab_size: int, width: int, scale: float) -> None:
        super().__init__()
        self.key, self.shape = key, (vocab_size, width)
        self.weight = torch.empty(0)
        self._build = build
        self.scale = torch.tensor(scale, dtype=build.dtype, device=build.device)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight) * self.scale

    def parts(self) -> Iterator[Part]:
        yield Part(self.key, self.shape, self._store)

    def _store(self, tensor: Tensor) -> None:
        self.weight = self._build.empty(*self.shape).copy_(tensor)


class Head(nn.Module):
    """hidden [M, E] -> logits [M, V] in float32, scaled and, where the model does, capped."""

    def __init__(self, build: Build, scale: float, soft_cap: float | None) -> None:
        super().__init__()
        self.multiply: Callable[[Tensor], Tensor] = _not_loaded
        self.scale = scale
        self.cap = _uncapped if soft_cap is None else _capped(soft_cap)
        self._build = build

    def forward(self, hidden: Tensor) -> Tensor:
        return self.cap(self.multiply(hidden).float() * self.scale)

    def load(self, tensor: Tensor) -> None:
        self.tie(self._build.empty(*tensor.shape).copy_(tensor))

    def tie(self, weight: Tensor) -> None:
        """Uses this very weight, in the model's dtype and on its device."""
        self.multiply = self._build.ops.pack_linear(weight, None)


class RmsNorm(nn.Module):
    """Norm over the last dimension. With an offset the weight stays in float32, exact."""

    def __init__(self, build: Build, key: str, width: int, eps: float, offset: float) -> None:
        super().__init__()
        self.key, self.width, self.eps, self.offset = key, width, eps, offset
        self.weight = torch.empty(0)
        self._normalise = build.ops.rms_norm
        self._dtype = torch.float32 if offset else build.dtype
        self._device = build.device

    def forward(self, x: Tensor) -> Tensor:
        return self._normalise(x, self.weight, self.eps)

    def parts(self) -> Iterator[Part]:
        yield Part(self.key, (self.width,), self._store)

    def _store(self, tensor: Tensor) -> None:
        shifted = tensor.to(self._device, torch.float32) + self.offset
        self.weight = shifted.to(self._dtype)


class Scale(nn.Module):
    """x times a constant."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _not_loaded(_: Tensor) -> Tensor:
    raise AssertionError("a layer was used before its weights were loaded")


def _uncapped(logits: Tensor) -> Tensor:
    return logits


def _capped(soft_cap: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits.div_(soft_cap).tanh_().mul_(soft_cap)
