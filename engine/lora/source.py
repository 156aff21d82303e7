"""Source: what an adapter is read from, its file and the weights of its base."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from safetensors import safe_open
from torch import Tensor

from engine.lora.weights import AdapterLoadError
from engine.model.base_weights import BaseWeights

OpenBase = Callable[[], BaseWeights]


class Source:
    """An adapter's open file. The base is opened when it is needed first, and closed by `opened`.

    `dtype` is that of the model.
    """

    def __init__(
        self,
        file: safe_open,
        dtype: torch.dtype,
        open_base: OpenBase | None,
        opened: ExitStack,
    ) -> None:
        self.dtype = dtype
        self._file = file
        self._open_base = open_base
        self._opened = opened
        self._base: BaseWeights | None = None

    def tensor(self, name: str, shape: tuple[int, ...], asker: str) -> Tensor:
        """Read a tensor as stored. Raises AdapterLoadError if `asker` has another shape."""
        tensor = self._file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise AdapterLoadError(
                f"{name} is {tuple(tensor.shape)}; {asker} of the base asks for {shape}"
            )
        return tensor

    @property
    def base(self) -> BaseWeights:
        """The base's weights."""
        if self._base is None:
            if self._open_base is None:
                raise AdapterLoadError("the adapter needs weights of the base, which are not there")
            self._base = self._opened.enter_context(self._open_base())
        return self._base
