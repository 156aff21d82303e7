"""Defines the leaves of the decoder: embedding, linear and norm, each with its expected weights.

A leaf names the checkpoint tensors that it needs (`parts`) and how to store each; it opens no file.
A linear layer keeps its parts as given, dense or quantized, and is packed into its op's form when
the last one arrives.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.inputs import ForwardInputs, Heads, Overlays
from engine.model.ops import TorchOps, WeightOps
from engine.model.quantized_weight import QuantizedWeight, can_join, join

Matrix = TypeVar("Matrix")


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor: its key, its shape, and how to store it.

    `module` is the linear layer whose weight it is: only that may come as a QuantizedWeight.
    """

    key: str
    shape: tuple[int, ...]
    store: Callable[[Any], None]
    module: str | None = None


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
    """Ops, dtype and device of all leaves; `torch_ops` matter only if a Decoder computes itself."""

    weight_ops: WeightOps
    torch_ops: TorchOps
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class Linear(nn.Module):
    """Computes y = x W^T + b, plus each row's adapter. The weight has the op's packed form."""

    def __init__(self, build: Build, place: LoraSite, bias: bool) -> None:
        super().__init__()
        self.place = place
        self.layer, self.site = place.layer, place.site
        self.multiply: Callable[[Tensor], Tensor] = _not_loaded
        self.quantized_bytes: dict[str, int] = {}  # of quantized parts, by key
        self._build = build
        self._weights: dict[int, Tensor | QuantizedWeight] = {}  # by slice, until all have arrived
        self._has_bias = bias
        self._bias = build.empty(place.out_features) if bias else None  # until it is packed
        self._pending = len(place.slices) * (2 if bias else 1)

    def forward(self, x: Tensor, inputs: ForwardInputs) -> Tensor:
        y = self.multiply(x)
        if inputs.lora is not None:
            inputs.lora.add(self.layer, self.site, x, y)
        return y

    def parts(self) -> Iterator[Part]:
        start = 0
        for i, part in enumerate(self.place.slices):
            rows = slice(start, start + part.out_features)
            key, shape = f"{part.module}.weight", (part.out_features, self.place.in_features)
            yield Part(key, shape, self._weight_of(i, key), part.module)
            if self._has_bias:
                yield Part(f"{part.module}.bias", shape[:1], self._bias_rows(rows))
            start = rows.stop

    def matrices(self, kind: type[Matrix]) -> tuple[Matrix, ...]:
        """Return the results of `pack_linear` for the weight, in the order of the outputs.

        Raises TypeError unless all are of this kind: each backend's WeightOps have their own.
        """
        multiply = self.multiply
        parts = multiply.multiplies if isinstance(multiply, SideBySide) else (multiply,)
        found = tuple(part for part in parts if isinstance(part, kind))
        if len(found) != len(parts):
            made = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(f"layer {self.layer}, {self.site}: {made}; needed is {kind.__name__}")
        return cast("tuple[Matrix, ...]", found)

    def _weight_of(self, index: int, key: str) -> Callable[[Tensor | QuantizedWeight], None]:
        def store(weight: Tensor | QuantizedWeight) -> None:
            if isinstance(weight, QuantizedWeight):
                self.quantized_bytes[key] = weight.nbytes
            self._weights[index] = weight
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
            weights = [self._weights.pop(i) for i in range(len(self.place.slices))]
            self.multiply = self._packed(weights)
            self._bias = None

    def _packed(self, weights: list[Tensor | QuantizedWeight]) -> Callable[[Tensor], Tensor]:
        """Pack one matrix if possible, else one for each run of slices that can share one."""
        multiplies: list[Callable[[Tensor], Tensor]] = []
        start = 0
        for run in _runs(weights):
            stop = start + sum(map(_out_features, run))
            bias = None if self._bias is None else self._bias[start:stop]
            multiplies.append(self._build.weight_ops.pack_linear(self._joined(run), bias))
            start = stop
        return multiplies[0] if len(multiplies) == 1 else SideBySide(tuple(multiplies))

    def _joined(self, run: list[Tensor | QuantizedWeight]) -> Tensor | QuantizedWeight:
        quantized = [weight for weight in run if isinstance(weight, QuantizedWeight)]
        if quantized:
            return join(quantized)
        dense, start = self._build.empty(sum(map(_out_features, run)), self.place.in_features), 0
        for weight in run:
            assert isinstance(weight, Tensor)
            dense[start : start + len(weight)] = weight
            start += len(weight)
        return dense


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Multiplies x [N, in] by several matrices; concatenates their outputs."""

    multiplies: tuple[Callable[[Tensor], Tensor], ...]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([multiply(x) for multiply in self.multiplies], -1)


def _runs(weights: list[Tensor | QuantizedWeight]) -> list[list[Tensor | QuantizedWeight]]:
    """Group neighbours that one matrix can hold."""
    runs = [[weights[0]]]
    for weight in weights[1:]:
        if _alike(runs[-1][-1], weight):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    return runs


def _alike(a: Tensor | QuantizedWeight, b: Tensor | QuantizedWeight) -> bool:
    if isinstance(a, QuantizedWeight) and isinstance(b, QuantizedWeight):
        return can_join(a, b)
    return isinstance(a, Tensor) and isinstance(b, Tensor)


def _out_features(weight: Tensor | QuantizedWeight) -> int:
    return weight.out_features if isinstance(weight, QuantizedWeight) else len(weight)


class Embedding(nn.Module):
    """Looks up rows of a matrix by token id, times a scale rounded to the weights' dtype."""

    def __init__(self, build: Build, key: str, vocab_size: int, width: int, scale: float) -> None:
        super().__init__()
        self.key, self.shape = key, (vocab_size, width)
        self.weight = torch.empty(0)
        self._build = build
        self.scale = torch.tensor(scale, dtype=build.dtype, device=build.device)

    def forward(self, token_ids: Tensor, overlays: Overlays | None = None) -> Tensor:
        if overlays is not None:
            return overlays.embed(token_ids, self.weight) * self.scale
        return F.embedding(token_ids, self.weight) * self.scale

    def parts(self) -> Iterator[Part]:
        yield Part(self.key, self.shape, self._store)

    def _store(self, tensor: Tensor) -> None:
        self.weight = self._build.empty(*self.shape).copy_(tensor)


class Head(nn.Module):
    """Computes hidden [M, E] -> logits [M, V] in float32, scaled and, if the model does, capped."""

    def __init__(self, build: Build, scale: float, soft_cap: float | None) -> None:
        super().__init__()
        self.multiply: Callable[[Tensor], Tensor] = _not_loaded
        self.quantized_bytes = 0  # of the weight; 0: it is dense
        self.scale = scale
        self.cap = _uncapped if soft_cap is None else _capped(soft_cap)
        self._build = build

    def forward(self, hidden: Tensor, heads: Heads | None = None) -> Tensor:
        if heads is None:
            return self.finish(self.multiply(hidden))
        logits = None if heads.are_whole else self.multiply(hidden)
        vocab_size = 0 if logits is None else logits.shape[1]
        logits = self.finish(heads.change(hidden, logits))
        heads.forbid(logits, vocab_size)  # after the cap, which would make -inf finite
        return logits

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and cap logits in place."""
        return self.cap(logits if self.scale == 1.0 else logits.mul_(self.scale))

    def load(self, weight: Tensor | QuantizedWeight) -> None:
        if isinstance(weight, Tensor):
            weight = self._build.empty(*weight.shape).copy_(weight)
        self.tie(weight)

    def tie(self, weight: Tensor | QuantizedWeight) -> None:
        """Use this weight without a copy: quantized, or in the model's dtype and on its device."""
        self.quantized_bytes = weight.nbytes if isinstance(weight, QuantizedWeight) else 0
        self.multiply = self._build.weight_ops.pack_head(weight)


class RmsNorm(nn.Module):
    """Norm over the last dimension. With an offset the weight stays in float32, to be exact."""

    def __init__(self, build: Build, key: str, width: int, eps: float, offset: float) -> None:
        super().__init__()
        self.key, self.width, self.eps, self.offset = key, width, eps, offset
        self.weight = torch.empty(0)
        self._normalise = build.torch_ops.rms_norm
        self._dtype = torch.float32 if offset else build.dtype
        self._device = build.device

    def forward(self, x: Tensor, overlays: Overlays | None = None) -> Tensor:
        if overlays is None:
            return self._apply_weight(x, self.weight)
        return overlays.norm(self.key.removesuffix(".weight"), x, self.weight, self._apply_weight)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._normalise(x, weight, self.eps)

    def parts(self) -> Iterator[Part]:
        yield Part(self.key, (self.width,), self._store)

    def _store(self, tensor: Tensor) -> None:
        shifted = tensor.to(self._device, torch.float32) + self.offset
        self.weight = shifted.to(self._dtype)


class Scale(nn.Module):
    """Multiplies x by a constant."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, overlays: Overlays | None = None) -> Tensor:
        return x * self.scale


class Unchanged(nn.Identity):
    """Stands where other models have a norm or a scale."""

    def forward(self, x: Tensor, overlays: Overlays | None = None) -> Tensor:
        return x


def _not_loaded(_: Tensor) -> Tensor:
    raise AssertionError("a layer was used before its weights were loaded")


def _uncapped(logits: Tensor) -> Tensor:
    return logits


def _capped(soft_cap: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits.div_(soft_cap).tanh_().mul_(soft_cap)
