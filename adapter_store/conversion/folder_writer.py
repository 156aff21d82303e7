"""Write a PEFT LoRA folder module by module, without holding it in memory."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapter_store.conversion.change import Factors
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.manifest import canonical_config
from adapter_store.peft_config import CONFIG_NAME

_ENTRY_BYTES = 160  # of a tensor in the header, beside its name


class FolderWriter:
    """Writes the weights as they come, and the header before them at the end.

    A context manager: it closes the file.
    """

    def __init__(self, folder: Path, modules: list[str]) -> None:
        self._folder = folder
        self._reserved = 64 + sum(3 * (len(name) + _ENTRY_BYTES) for name in modules)
        self._reserved += -self._reserved % 8
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._ranks: dict[str, int] = {}
        self._alphas: dict[str, float] = {}
        self._has_magnitudes = False
        self._at = 0
        self._file = (folder / WEIGHTS_NAME).open("wb")
        self._file.seek(8 + self._reserved)

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, module: str, factors: Factors) -> None:
        """Append one module; A [r, in] and B [out, r]."""
        lora_rank = factors.a.shape[0]
        self._ranks[module] = lora_rank
        self._alphas[module] = _alpha(factors.scaling, lora_rank)
        sides = zip("AB", (factors.a, factors.b), factors.dtypes, strict=True)
        for side, array, dtype in sides:
            self._write(f"{module}.lora_{side}.weight", dtype, array)
        if factors.magnitude is not None:
            self._has_magnitudes = True
            self._write(f"{module}.lora_magnitude_vector", *factors.magnitude)

    def _write(self, name: str, dtype: str, array: npt.NDArray[Any]) -> None:
        end = self._at + array.nbytes
        self._entries[f"base_model.model.{name}"] = {
            "dtype": dtype,
            "shape": array.shape,
            "data_offsets": (self._at, end),
        }
        self._file.write(np.ascontiguousarray(array).data)
        self._at = end

    def finish(self) -> None:
        """Write the header and the config."""
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._reserved.to_bytes(8, "little") + header.ljust(self._reserved))
        kinds = {"use_dora": True} if self._has_magnitudes else None
        config = canonical_config(self._ranks, self._alphas, False, kinds)
        (self._folder / CONFIG_NAME).write_bytes(config)


def _alpha(scaling: float, lora_rank: int) -> float:
    """Find the lora_alpha that, divided by the rank, is this scaling, or nearly so."""
    alpha = scaling * lora_rank
    nearby = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((each for each in nearby if each / lora_rank == scaling), alpha)
