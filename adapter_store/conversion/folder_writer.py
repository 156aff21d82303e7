"""Write a PEFT LoRA folder tensor by tensor, without holding it in memory."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapter_store.conversion.change import Factors, Saved
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.manifest import canonical_config
from adapter_store.peft_config import CONFIG_NAME, EMBEDDING

_ENTRY_BYTES = 160  # of a tensor in the header, beside its name
_NUM_KINDS = 3  # tensors that may be of one module


class FolderWriter:
    """Writes the weights as they come, and the header before them at the end.

    A context manager: it closes the file.
    """

    def __init__(self, folder: Path, modules: Iterable[str], saved: Iterable[str]) -> None:
        self._folder = folder
        names = [*_NUM_KINDS * [*modules], *saved]
        self._reserved = 1024 + sum(len(name) + _ENTRY_BYTES for name in names)
        self._reserved += -self._reserved % 8
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._ranks: dict[str, int] = {}
        self._alphas: dict[str, float] = {}
        self._has_magnitudes = False
        self._saved: list[Saved] = []
        self._at = 0
        self._file = (folder / WEIGHTS_NAME).open("wb")
        self._file.seek(8 + self._reserved)

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def has_factors(self) -> bool:
        return bool(self._ranks)

    @property
    def is_empty(self) -> bool:
        return not self._ranks and not self._saved

    def add(self, module: str, factors: Factors) -> None:
        """Append one module; A [r, in] and B [out, r]."""
        lora_rank = factors.a.shape[0]
        self._ranks[module] = lora_rank
        self._alphas[module] = _alpha(factors.scaling, lora_rank)
        sides = zip("AB", (factors.a, factors.b), factors.dtypes, strict=True)
        is_embedding = module.rpartition(".")[2] == EMBEDDING
        for side, array, dtype in sides:
            name = f"lora_embedding_{side}" if is_embedding else f"lora_{side}.weight"
            self._write(f"{module}.{name}", dtype, array)
        if factors.magnitude is not None:
            self._has_magnitudes = True
            self._write(f"{module}.lora_magnitude_vector", *factors.magnitude)

    def save(self, saved: Saved) -> None:
        """Append a parameter that replaces the base's, or rows of it."""
        module, _, end = saved.name.rpartition(".")
        name = saved.name
        if saved.token_ids:
            name = f"{module}.token_adapter.trainable_tokens_delta"
        elif module in self._ranks:  # as PEFT names what it has wrapped
            name = f"{module}.base_layer.{end}"
        self._saved.append(saved)
        self._write(name, saved.dtype, *saved.blocks, shape=saved.shape)

    def _write(
        self, name: str, dtype: str, *arrays: npt.NDArray[Any], shape: tuple[int, ...] | None = None
    ) -> None:
        start = self._at
        for array in arrays:
            self._file.write(np.ascontiguousarray(array).data)
            self._at += array.nbytes
        self._entries[f"base_model.model.{name}"] = {
            "dtype": dtype,
            "shape": shape or arrays[0].shape,
            "data_offsets": (start, self._at),
        }

    def finish(self) -> None:
        """Write the header and the config."""
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._reserved.to_bytes(8, "little") + header.ljust(self._reserved))
        config = canonical_config(self._ranks, self._alphas, False, self._kinds())
        (self._folder / CONFIG_NAME).write_bytes(config)

    def _kinds(self) -> dict[str, object]:
        kinds: dict[str, object] = {"use_dora": True} if self._has_magnitudes else {}
        rows = {s.name.rpartition(".")[0]: list(s.token_ids) for s in self._saved if s.token_ids}
        wholes = [s for s in self._saved if not s.token_ids and not s.is_shared]
        if rows:
            kinds["trainable_token_indices"] = rows
        if names := [s.name.removesuffix(".weight") for s in wholes if s.name.endswith(".weight")]:
            kinds["modules_to_save"] = names
        if len(names) < len(wholes):
            kinds["bias"] = "all"
        return kinds


def _alpha(scaling: float, lora_rank: int) -> float:
    """Find the lora_alpha that, divided by the rank, is this scaling, or nearly so."""
    alpha = scaling * lora_rank
    nearby = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((each for each in nearby if each / lora_rank == scaling), alpha)
