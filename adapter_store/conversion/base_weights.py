"""Read the weights of a base's modules from its folder, one at a time."""

import json
from collections.abc import Mapping
from pathlib import Path

from adapter_store.bases import weight_files
from adapter_store.conversion.change import BaseWeights
from adapter_store.conversion.tensor_file import Matrix, TensorFile, open_tensors
from adapter_store.errors import AdapterInvalid
from adapter_store.wrapped_names import plain_name, whole_name


def open_model(folder: Path) -> tuple[TensorFile, Mapping[str, str]]:
    """Open a model's files; its tensors' names by their plain ones. Raises AdapterInvalid."""
    try:
        paths = weight_files(folder)
    except (OSError, ValueError, AttributeError, json.JSONDecodeError) as error:
        raise AdapterInvalid(f"{folder} is not a readable model folder: {error}") from error
    file = open_tensors(paths)
    return file, {whole_name(name): name for name in file.entries}


def base_weights(folder: Path | None) -> BaseWeights:
    """Return a function that reads a module's weight, [out, in] in float32."""
    opened: list[tuple[TensorFile, Mapping[str, str]]] = []

    def read(module: str) -> Matrix:
        if folder is None:
            raise AdapterInvalid(
                f"{module}: the method multiplies the base's weights, so the base must be given by "
                "its folder: --base path/to/model"
            )
        if not opened:
            opened.append(open_model(folder))
        file, names = opened[0]
        return read_weight(file, names, module)

    return read


def read_weight(file: TensorFile, names: Mapping[str, str], module: str) -> Matrix:
    """Read the weight of a module by its plain name. Raises AdapterInvalid."""
    name = names.get(f"{whole_name(plain_name(module))}.weight")
    if name is None:
        raise AdapterInvalid(f"the base has no {module}.weight")
    weight = file.read(name)
    if weight.ndim != 2:
        raise AdapterInvalid(f"tensor {name} {list(weight.shape)} of the base must be a matrix")
    return weight
