"""Extract an adapter from a model that was trained as a whole, by its difference from the base."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from adapter_store.bases import CONFIG_NAME as MODEL_CONFIG_NAME
from adapter_store.bases import INDEX_NAME
from adapter_store.bases import WEIGHTS_NAME as MODEL_WEIGHTS_NAME
from adapter_store.conversion.change import Change, Saved
from adapter_store.conversion.model_configs import check_configs
from adapter_store.conversion.model_weights import ModelWeights, open_model
from adapter_store.conversion.saved_rows import EMBEDDING, HEAD, trained_rows, vocabulary_changes
from adapter_store.conversion.tensor_file import in_float32, open_tensors
from adapter_store.errors import AdapterInvalid
from adapter_store.peft_config import CONFIG_NAME


def is_model(folder: Path) -> bool:
    """Check whether a folder holds a whole model, and no adapter."""
    has_weights = any((folder / name).is_file() for name in (MODEL_WEIGHTS_NAME, INDEX_NAME))
    is_adapter = (folder / CONFIG_NAME).exists()
    return has_weights and (folder / MODEL_CONFIG_NAME).is_file() and not is_adapter


def open_fine_tune(folder: Path, base_folder: Path | None) -> "FineTune":
    """Open a model that was trained as a whole. Raises AdapterInvalid."""
    base = _open_base(f"{folder} is a whole model", base_folder)
    tuned = open_model(folder)
    check_configs(tuned.config, base.config)
    return FineTune("FINE_TUNE", tuned, base)


def open_trained_part(name: str, weights: Path, base_folder: Path | None) -> "FineTune":
    """Open the file of those weights of a model that were trained. Raises AdapterInvalid."""
    base = _open_base(f"{weights.name} holds whole weights", base_folder)
    return FineTune(name, ModelWeights(base.config, open_tensors([weights])), base, is_part=True)


def _open_base(what: str, folder: Path | None) -> ModelWeights:
    if folder is None:
        raise AdapterInvalid(f"{what}: the base must be given by its folder, --base path/to/model")
    return open_model(folder)


class FineTune:
    """A Source: the weights that differ from the base's. Raises AdapterInvalid."""

    def __init__(
        self, name: str, tuned: ModelWeights, base: ModelWeights, is_part: bool = False
    ) -> None:
        self.name = name
        self._tuned, self._base = tuned, base
        self._is_part = is_part
        self._check_names()
        self.modules = {name: tuned.nbytes(name) for name in sorted(tuned.modules)}

    def change(self, module: str, shape: tuple[int, int]) -> Change | None:
        tuned, base = self._tuned.weight(module), self._base.weight(module)
        if tuned.shape != base.shape:
            raise AdapterInvalid(f"{module} is {tuned.shape}, and {base.shape} in the base")
        return None if np.array_equal(tuned, base) else tuned - base

    def saved(self) -> Iterator[Saved]:
        changes = trained_rows if self._is_part else vocabulary_changes
        yield from changes(self._tuned, self._base)
        for name in sorted(self._tuned.others):
            if name not in (EMBEDDING, HEAD) and (change := self._vector(name)) is not None:
                yield change

    def _vector(self, name: str) -> Saved | None:
        """Return a norm or a bias if it differs; refuse what is neither and does."""
        (dtype, tuned), (base_dtype, base) = (
            model.file.raw(model.others[name]) for model in (self._tuned, self._base)
        )
        if np.array_equal(in_float32(dtype, tuned), in_float32(base_dtype, base)):
            return None
        if tuned.ndim != 1 or not name.endswith((".weight", ".bias")):
            raise AdapterInvalid(
                f"tensor {name} {list(tuned.shape)} differs from the base's, and only linear "
                "layers of attention and MLP, norms, biases, embeddings and the output layer may: "
                "train with it frozen, or serve the model as a base"
            )
        return Saved(name, dtype, tuned.shape, iter([tuned]))

    def _check_names(self) -> None:
        tied = {HEAD}  # saved or not, where the embeddings are used as output layer
        ours, theirs = ({*m.modules, *m.others} for m in (self._tuned, self._base))
        if named := sorted(ours - theirs - tied):
            raise AdapterInvalid(f"the base has no tensor {named[0]}, and the model has")
        if (named := sorted(theirs - ours - tied)) and not self._is_part:
            raise AdapterInvalid(f"the model has no tensor {named[0]}, and the base has")
