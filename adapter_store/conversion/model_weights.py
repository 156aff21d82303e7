"""Read the weights of a model folder under plain names, one at a time, dequantized if need be."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from adapter_store.bases import CONFIG_NAME, is_module_weight, weight_files
from adapter_store.conversion.change import BaseWeights
from adapter_store.conversion.packed_weights import packed_modules
from adapter_store.conversion.tensor_file import Matrix, TensorFile, open_tensors
from adapter_store.errors import AdapterInvalid
from adapter_store.wrapped_names import plain_name, whole_name

_DERIVED = ".rotary_emb.inv_freq"  # what old files store of the config


class ModelWeights:
    """The tensors of a model, or of a part of one.

    `modules` are the linear layers that adapters may change, `others` maps the names of all other
    tensors to those in `file`.
    """

    def __init__(self, config: dict[str, Any], file: TensorFile) -> None:
        self.config = config
        self.file = file
        self._packed = packed_modules(self.file)
        parts = {name for module in self._packed.values() for name in module.names.values()}
        dense = [name for name in self.file.entries if name not in parts]
        self._dense = {
            whole_name(name).removesuffix(".weight"): name
            for name in dense
            if is_module_weight(name)
        }
        self._packed = {whole_name(name): module for name, module in self._packed.items()}
        self.modules = frozenset(self._dense) | frozenset(self._packed)
        self.others = {
            whole_name(name): name
            for name in dense
            if not is_module_weight(name) and not name.endswith(_DERIVED)
        }

    def weight(self, module: str) -> Matrix:
        """Read the weight of one of the modules, [out, in] in float32. Raises AdapterInvalid."""
        if module in self._packed:
            return self._packed[module].read(self.file, nested(self.config, "quantization_config"))
        name = self._dense[module]
        weight = self.file.read(name)
        if weight.ndim != 2:
            raise AdapterInvalid(f"tensor {name} {list(weight.shape)} of the base must be a matrix")
        return weight

    def nbytes(self, module: str) -> int:
        """Return the bytes of a module's tensors."""
        is_packed = module in self._packed
        names = self._packed[module].names.values() if is_packed else [self._dense[module]]
        entries = [self.file.entries[name][1] for name in names]
        return sum(entry.end - entry.start for entry in entries)


def open_model(folder: Path) -> ModelWeights:
    """Open a model folder. Raises AdapterInvalid."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_bytes())
        paths = weight_files(folder)
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterInvalid(f"{folder} is not a readable model folder: {error}") from error
    return ModelWeights(config, open_tensors(paths))


def base_weights(folder: Path | None) -> BaseWeights:
    """Return a function that reads a module's weight, [out, in] in float32."""
    opened: list[ModelWeights] = []

    def read(module: str) -> Matrix:
        if folder is None:
            raise AdapterInvalid(
                f"{module}: the method multiplies the base's weights, so the base must be given by "
                "its folder: --base path/to/model"
            )
        if not opened:
            opened.append(open_model(folder))
        name = whole_name(plain_name(module))
        if name not in opened[0].modules:
            raise AdapterInvalid(f"the base has no {module}.weight")
        return opened[0].weight(name)

    return read


def nested(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a mapping in a config, or an empty one."""
    found: Any = config.get(key)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
