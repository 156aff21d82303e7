"""Extract an adapter from a model that was trained as a whole, by its difference from the base."""

from pathlib import Path

import numpy as np

from adapter_store.bases import CONFIG_NAME as MODEL_CONFIG_NAME
from adapter_store.bases import INDEX_NAME, is_module_weight
from adapter_store.bases import WEIGHTS_NAME as MODEL_WEIGHTS_NAME
from adapter_store.conversion.base_weights import open_model
from adapter_store.conversion.change import Change
from adapter_store.errors import AdapterInvalid
from adapter_store.peft_config import CONFIG_NAME


def is_model(folder: Path) -> bool:
    """Check whether a folder holds a whole model, and no adapter."""
    has_weights = any((folder / name).is_file() for name in (MODEL_WEIGHTS_NAME, INDEX_NAME))
    is_adapter = (folder / CONFIG_NAME).exists()
    return has_weights and (folder / MODEL_CONFIG_NAME).is_file() and not is_adapter


class FineTune:
    """A Source: the weights that differ from the base's. Raises AdapterInvalid."""

    name = "FINE_TUNE"

    def __init__(self, folder: Path, base_folder: Path | None) -> None:
        if base_folder is None:
            raise AdapterInvalid(
                f"{folder} is a whole model: its base must be given by its folder, "
                "--base path/to/model"
            )
        self._tuned, self._tuned_names = open_model(folder)
        self._base, self._base_names = open_model(base_folder)
        self._check_names()
        self._check_others()
        self.modules = {
            name.removesuffix(".weight"): self._nbytes(name)
            for name in sorted(self._tuned_names)
            if is_module_weight(name) and self._differs(name)
        }
        if not self.modules:
            raise AdapterInvalid(f"{folder} has the same weights as its base")

    def change(self, module: str, shape: tuple[int, int]) -> Change:
        name = f"{module}.weight"
        tuned = self._tuned.read(self._tuned_names[name])
        base = self._base.read(self._base_names[name])
        if tuned.shape != base.shape or tuned.ndim != 2:
            raise AdapterInvalid(f"{name} is {tuned.shape}, and {base.shape} in the base")
        return tuned - base

    def _check_names(self) -> None:
        tied = {"lm_head.weight"}  # saved or not, where the embeddings are used as output layer
        for ours, others, whose in (
            (self._tuned_names, self._base_names, "the base"),
            (self._base_names, self._tuned_names, "the model"),
        ):
            missing = sorted(set(ours) - set(others) - tied)
            if missing:
                raise AdapterInvalid(f"{whose} has no tensor {missing[0]}, and the other has")

    def _check_others(self) -> None:
        """Refuse changes of what factors cannot change: norms, embeddings, biases."""
        for name in self._tuned_names:
            if not is_module_weight(name) and name in self._base_names and self._differs(name):
                raise AdapterInvalid(
                    f"tensor {name} differs from the base's, and only the linear layers of "
                    "attention and MLP become factors: train with it frozen, or serve the model "
                    "as a base"
                )

    def _differs(self, name: str) -> bool:
        mine, base = self._tuned_names[name], self._base_names[name]
        ours, theirs = self._tuned.raw(mine), self._base.raw(base)
        if ours[0] == theirs[0]:
            return not np.array_equal(ours[1], theirs[1])
        return not np.array_equal(self._tuned.read(mine), self._base.read(base))

    def _nbytes(self, name: str) -> int:
        entry = self._tuned.entries[self._tuned_names[name]][1]
        return entry.end - entry.start
