"""Read PEFT's methods that replace parameters of the base and have no factors: they stay exact."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapter_store.conversion.change import Saved
from adapter_store.conversion.tensor_file import open_tensors
from adapter_store.errors import AdapterInvalid
from adapter_store.layout import HEADER_LIMITS, WEIGHTS_NAME
from adapter_store.peft_config import settings_of
from adapter_store.saved import is_vocabulary
from adapter_store.tensor_causes import refuse_broken
from adapter_store.wrapped_names import plain_name, without_prefix

# Ends of their tensors' names
_ENDS = {
    "LN_TUNING": (".ln_tuning_layers.weight", ".ln_tuning_layers.bias"),
    "TRAINABLE_TOKENS": (".trainable_tokens_delta",),
}


def has_no_factors(peft_type: object) -> bool:
    """Check whether a method is one of these."""
    return peft_type in _ENDS


class SavedUpload:
    """A Source: norms of LN tuning, or rows of trained tokens. Raises AdapterInvalid."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.name = str(config["peft_type"])
        self.modules: dict[str, int] = {}
        self._token_ids = _token_ids(config)
        self._file = open_tensors([folder / WEIGHTS_NAME], HEADER_LIMITS)
        self._names: dict[str, str] = {}
        for name, (_, entry) in self._file.entries.items():
            refuse_broken(name, entry)
            parameter = self._parameter(name)
            if parameter in self._names:
                raise AdapterInvalid(f"{parameter} has two tensors: {name} is the second")
            self._names[parameter] = name
        if not self._names:
            raise AdapterInvalid(f"{WEIGHTS_NAME} holds no tensor of {self.name}")

    def change(self, module: str, shape: tuple[int, int]) -> None:
        return None

    def saved(self) -> Iterator[Saved]:
        for parameter, name in sorted(self._names.items()):
            dtype, values = self._file.raw(name)
            ids = self._token_ids if self.name == "TRAINABLE_TOKENS" else ()
            if ids and values.shape[:1] != (len(ids),):
                raise AdapterInvalid(
                    f"tensor {name} {list(values.shape)} must have a row for each of the "
                    f"{len(ids)} token_indices"
                )
            yield Saved(parameter, dtype, values.shape, iter([values]), ids)

    def _parameter(self, name: str) -> str:
        """Name the parameter of the base that a tensor replaces, or rows of it."""
        plain = plain_name(without_prefix(name))
        end = next((end for end in _ENDS[self.name] if plain.endswith(end)), None)
        module = plain.removesuffix(end or "")
        if end is None or (self._token_ids and not is_vocabulary(module)):
            raise AdapterInvalid(
                f"tensor {name} is none of {self.name}'s, which end in "
                f"{' and '.join(_ENDS[self.name])}"
            )
        return f"{module}.bias" if end.endswith(".bias") else f"{module}.weight"


def _token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    if config["peft_type"] != "TRAINABLE_TOKENS":
        return ()
    lora: dict[str, Any] = {"peft_type": "LORA", "target_modules": []}
    found = settings_of({**lora, "trainable_token_indices": config.get("token_indices")})
    ids = next(iter(found.token_ids.values()), ())
    if not ids:
        raise AdapterInvalid("token_indices is missing: it names the tokens that were trained")
    return ids
