"""BaseWeights: reads single weights of a model again, as it serves them.

The decoder keeps its weights in the form of its kernels. What adapters need of the base's own (the
rows' norms of DoRA, the biases that replaced ones differ from) is read from the checkpoint, in the
threads that load adapters, a few rows at a time.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from engine.model.checkpoint import Checkpoint
from engine.model.families import read_scheme, read_spec
from engine.model.loader import FLOATS, Reader
from engine.model.quantized_weight import QuantizedWeight, dequantize

BLOCK_VALUES = 2**20  # of a weight in float32 at a time


class BaseWeights:
    """Opens a checkpoint; use it as a context manager. Raises ModelError.

    Weights come in float32, rounded to `dtype` and quantized as the model has them.
    """

    def __init__(self, folder: Path, quantization: str, dtype: torch.dtype) -> None:
        self.spec = read_spec(folder, None)
        self._checkpoint = Checkpoint(folder)
        device = torch.device("cpu")  # loading threads do not disturb the steps of another
        self._reader = Reader(self._checkpoint, read_scheme(folder), quantization, device)
        self._dtype = dtype

    def __enter__(self) -> "BaseWeights":
        self._checkpoint.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._checkpoint.__exit__(kind, error, trace)

    def rows(self, module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
        """Yield the weight of a linear layer in blocks of rows [n, in], in order."""
        weight = self._reader.linear(module, out_features, in_features)
        step = max(1, BLOCK_VALUES // in_features)
        for start in range(0, out_features, step):
            rows = slice(start, start + step)
            if isinstance(weight, QuantizedWeight):
                yield dequantize(weight.rows(rows))
            else:
                yield weight[rows].to(self._dtype).float()

    def vocabulary(self, key: str) -> Tensor:
        """Return a view of the embedding or of the output layer, as stored [V, E]."""
        shape = self.spec.vocab_size, self.spec.hidden_size
        return self._checkpoint.tensor(key, shape, FLOATS, "the config")

    def norm_width(self, module: str) -> int | None:
        """Return the length of a norm's weight, or None if the model has no such norm."""
        key = f"{module}.weight"
        if key not in self._checkpoint:
            return None
        tensor = self._checkpoint.any_shape(key)
        return len(tensor) if tensor.dim() == 1 else None

    def bias(self, module: str, out_features: int) -> Tensor | None:
        """Return the bias [out] of a linear layer, or None if it has none."""
        key = f"{module}.bias"
        if key not in self._checkpoint:
            return None
        tensor = self._checkpoint.tensor(key, (out_features,), FLOATS, "the config")
        return tensor.to(self._dtype).float()
