"""Find the parameters of the base that an adapter replaces: biases, norms, rows of tokens.

The embedding and the output layer may be replaced as a whole, by row, or be stored although nobody
trained them; what differs from the base is for the engine to find.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from adapter_store.errors import AdapterInvalid
from adapter_store.peft_config import EMBEDDING, HEAD, LoraSettings
from adapter_store.safetensors_file import TensorEntry
from adapter_store.tensor_causes import cause_of
from adapter_store.tensor_names import Role

Found = dict[str, dict[Role, str]]  # tensors by module and role


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A parameter of the base that the adapter replaces as a whole.

    `is_base` says that PEFT loads it into the base's own parameter, so that what is tied to it
    changes too; else it is a copy for the module alone.
    """

    tensor: str  # name in adapter_model.safetensors
    shape: tuple[int, ...]
    dtype: str
    is_base: bool = False


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows [K, E] of the embedding or of the output layer that replace those of K token ids."""

    tensor: str
    token_ids: tuple[int, ...]  # in the order of the rows
    hidden_size: int
    dtype: str


def is_vocabulary(module: str) -> bool:
    """Check for the embedding and the output layer, which have a row for each token id."""
    return module.rpartition(".")[2] in (EMBEDDING, HEAD)


def take_saved(
    found: Found, tensors: Mapping[str, TensorEntry], settings: LoraSettings
) -> dict[str, SavedTensor]:
    """Remove biases and weights from `found`; return them by the parameter's name."""
    saved: dict[str, SavedTensor] = {}
    for module, roles in sorted(found.items()):
        if Role.BIAS in roles:
            name = roles.pop(Role.BIAS)
            saved[f"{module}.bias"] = _bias(name, tensors[name], settings)
        if Role.WEIGHT in roles:
            name = roles.pop(Role.WEIGHT)
            saved[f"{module}.weight"] = _weight(module, name, tensors[name], settings)
    for end in settings.modules_to_save:
        if not any(name.rpartition(".")[0].endswith(end) for name in saved):
            raise AdapterInvalid(
                f"modules_to_save names {end!r}, but no tensor is of such a module"
            )
    return saved


def take_token_rows(
    found: Found, tensors: Mapping[str, TensorEntry], settings: LoraSettings
) -> dict[str, TokenRows]:
    """Remove trained rows of tokens from `found`; return them by the module's name."""
    rows: dict[str, TokenRows] = {}
    for module, roles in sorted(found.items()):
        if Role.TOKENS in roles:
            name = roles.pop(Role.TOKENS)
            rows[module] = _token_rows(module, name, tensors[name], settings)
    missing = set(settings.token_ids) - {module.rpartition(".")[2] for module in rows}
    if missing:
        raise AdapterInvalid(
            f"trainable_token_indices names {min(missing)}, but no tensor holds its rows"
        )
    return rows


def _bias(name: str, tensor: TensorEntry, settings: LoraSettings) -> SavedTensor:
    if settings.bias == "none":
        raise AdapterInvalid(f"tensor {name} is a bias, but the config has bias='none'")
    if len(tensor.shape) != 1:
        raise AdapterInvalid(f"tensor {name} {tensor.shape} must be a vector")
    return SavedTensor(name, tensor.shape, tensor.dtype)


def _weight(module: str, name: str, tensor: TensorEntry, settings: LoraSettings) -> SavedTensor:
    is_listed = any(module.endswith(end) for end in settings.modules_to_save)
    if is_vocabulary(module):
        if len(tensor.shape) != 2:
            raise AdapterInvalid(f"tensor {name} {tensor.shape} must be a matrix")
        is_base = ".base_layer." in name or not is_listed
        return SavedTensor(name, tensor.shape, tensor.dtype, is_base)
    if ".lora_" in name or ".base_layer." in name or len(tensor.shape) != 1:
        raise AdapterInvalid(_unserved(module, name, is_listed or ".modules_to_save." in name))
    if not is_listed:
        raise AdapterInvalid(f"tensor {name}: modules_to_save does not name {module}")
    return SavedTensor(name, tensor.shape, tensor.dtype)


def _unserved(module: str, name: str, is_listed: bool) -> str:
    if not is_listed:
        return f"tensor {name} is neither a lora_A.weight nor a lora_B.weight{cause_of(name)}"
    return (
        f"tensor {name} replaces {module} as a whole, which is served of norms, {EMBEDDING} and "
        f"{HEAD} alone: train it with LoRA, or merge the adapter (merge_and_unload) and serve the "
        "result as a base"
    )


def _token_rows(module: str, name: str, tensor: TensorEntry, settings: LoraSettings) -> TokenRows:
    token_ids = settings.token_ids.get(module.rpartition(".")[2])
    if token_ids is None and module.rpartition(".")[2] == HEAD:
        # Where both are tied, PEFT writes the embedding's rows again with a resized vocabulary
        token_ids = settings.token_ids.get(EMBEDDING)
    if token_ids is None or not is_vocabulary(module):
        raise AdapterInvalid(f"tensor {name}: trainable_token_indices does not name {module}")
    if len(tensor.shape) != 2 or tensor.shape[0] != len(token_ids):
        raise AdapterInvalid(
            f"tensor {name} {tensor.shape} must have a row for each of the {len(token_ids)} tokens "
            "of trainable_token_indices"
        )
    return TokenRows(name, token_ids, tensor.shape[1], tensor.dtype)
