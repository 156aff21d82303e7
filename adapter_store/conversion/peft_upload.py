"""Read a PEFT folder of another method than LoRA."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapter_store.conversion.change import BaseWeights, Change, Saved
from adapter_store.conversion.methods import METHODS, Method
from adapter_store.conversion.setting import Setting
from adapter_store.conversion.tensor_file import Matrix, open_tensors
from adapter_store.errors import AdapterInvalid
from adapter_store.layout import HEADER_LIMITS, WEIGHTS_NAME
from adapter_store.peft_config import LoraSettings, settings_of
from adapter_store.saved import Found, is_vocabulary, take_saved
from adapter_store.tensor_causes import refuse_broken
from adapter_store.tensor_names import Role, is_copy, parse_tensor_name
from adapter_store.wrapped_names import configured_name, plain_name, without_prefix

# Keys of all methods: read through LoraSettings, or without effect on what was trained
_COMMON = (
    *("peft_type", "r", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "task_type", "auto_mapping", "peft_version"),
    *("base_model_name_or_path", "revision", "inference_mode", "init_weights", "runtime_config"),
    "modules_to_save",
)
_NEUTRAL = {"bias": "none", "fan_in_fan_out": False}
# The methods that multiply by alpha / r, and what their alpha is called
_SCALED = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
_WAY_OUT = (
    "merge it (merge_and_unload), save the model, and publish that folder with --convert, or serve "
    "it as a base"
)
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")


class PeftUpload:
    """A Source: a folder of one of the METHODS, or of the one that is given.

    Raises AdapterInvalid.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        base: BaseWeights | None,
        method: Method | None = None,
    ) -> None:
        self.name = str(config.get("peft_type"))
        self._method = method or _method_of(self.name)
        _check_keys(self.name, self._method, config)
        self._config = config
        self._base = base
        self._settings = _settings(self.name, config)
        self._file = open_tensors([folder / WEIGHTS_NAME], HEADER_LIMITS)
        self._names = self._claim()
        self._shared = {name: self._file.read(name) for name in self._method.shared}
        self.modules = {module: self._nbytes(names) for module, names in self._names.items()}

    def change(self, module: str, shape: tuple[int, int]) -> Change:
        tensors: dict[str, Matrix] = dict(self._shared)
        for part, name in self._names[module].items():
            tensors[part] = self._file.read(name)
        lora_rank, scaling = self._settings.lora_rank(module), self._settings.scaling(module)
        setting = Setting(self._config, lora_rank, scaling, shape)
        try:
            return self._method.change(tensors, setting, lambda: self._weight(module))
        except (KeyError, ValueError, IndexError) as error:
            raise AdapterInvalid(
                f"{module}: the tensors {', '.join(sorted(self._names[module]))} do not fit each "
                f"other, {self.name} and the module's {shape[0]} x {shape[1]}: {error}"
            ) from error

    def saved(self) -> Iterator[Saved]:
        for name, each in self._replaced.items():
            blocks = (self._file.raw(tensor)[1] for tensor in [each.tensor])
            yield Saved(name, each.dtype, each.shape, blocks, is_shared=each.is_base)

    def _weight(self, module: str) -> Matrix:
        assert self._base is not None, "a method that reads the base's weights gets them"
        return self._base(module)

    def _claim(self) -> dict[str, dict[str, str]]:
        """Find the module of each tensor; the names by module and end."""
        found: dict[str, dict[str, str]] = {}
        names: dict[str, str] = {}
        entries = {name: entry for name, (_, entry) in self._file.entries.items()}
        whole: Found = {}
        for name, entry in entries.items():
            refuse_broken(name, entry)
            if name in self._method.shared or is_copy(name, entries):
                continue
            if (replaced := self._whole(name)) is not None:
                whole[replaced] = {Role.WEIGHT: name}
                continue
            wrapped, part = self._split(name)
            module = plain_name(wrapped)
            names[module] = configured_name(wrapped, self._settings)
            if part in found.setdefault(module, {}):
                raise AdapterInvalid(f"{module} has two tensors {part}: {name} is the second")
            found[module][part] = name
        missing = [name for name in self._method.shared if name not in self._file.entries]
        if missing or not found:
            what = missing[0] if missing else f"tensor of {self.name}"
            raise AdapterInvalid(f"{WEIGHTS_NAME} holds no {what}")
        self._replaced = take_saved(whole, entries, self._settings)
        self._settings = self._settings.naming(names)
        for module in found:
            if not self._settings.include(module):
                raise AdapterInvalid(f"{module} has weights, but target_modules does not select it")
        return dict(sorted(found.items()))

    def _whole(self, name: str) -> str | None:
        """Return the module of a tensor that replaces its weight, as modules_to_save does."""
        parsed = parse_tensor_name(plain_name(without_prefix(name)))
        if parsed is None or parsed[1] is not Role.WEIGHT or self._part_of(name):
            return None
        module = parsed[0]
        is_listed = any(module.endswith(end) for end in self._settings.modules_to_save)
        return module if is_listed or is_vocabulary(module) else None

    def _part_of(self, name: str) -> str | None:
        return next((part for part in self._method.tensors if name.endswith(f".{part}")), None)

    def _split(self, name: str) -> tuple[str, str]:
        if part := self._part_of(name):
            return without_prefix(name).removesuffix(f".{part}"), part
        raise AdapterInvalid(
            f"tensor {name} is none of {self.name}'s for linear layers: "
            f"{', '.join(self._method.tensors)}; {_WAY_OUT}"
        )

    def _nbytes(self, names: Mapping[str, str]) -> int:
        entries = [self._file.entries[name][1] for name in names.values()]
        return sum(entry.end - entry.start for entry in entries)


def _method_of(peft_type: str) -> Method:
    method = METHODS.get(peft_type)
    if method is not None:
        return method
    if peft_type in _PROMPTS:
        reason = "it trains prompts, not weights, so no factors of weights can hold it"
        raise AdapterInvalid(f"peft_type={peft_type!r} cannot be converted: {reason}")
    raise AdapterInvalid(
        f"peft_type={peft_type!r} cannot be converted, only {', '.join(METHODS)}, IA3, LN_TUNING, "
        f"TRAINABLE_TOKENS and LORA; if it changes weights, {_WAY_OUT}"
    )


def _check_keys(peft_type: str, method: Method, config: Mapping[str, Any]) -> None:
    neutral = _NEUTRAL | dict(method.neutral)
    for key, value in config.items():
        if key in neutral:
            if value not in (neutral[key], None, []):
                raise AdapterInvalid(
                    f"{key}={value!r} of {peft_type} cannot be converted, only "
                    f"{key}={neutral[key]!r}; {_WAY_OUT}"
                )
        elif key not in _COMMON and key not in method.keys and value:
            raise AdapterInvalid(
                f"{key}={value!r} is not a key of {peft_type} that is known here, so it may change "
                "what the adapter computes"
            )


def _settings(peft_type: str, config: Mapping[str, Any]) -> LoraSettings:
    """Read ranks, alphas and targets with LoRA's rules, which are the same."""
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    keys = (*keys, "modules_to_save")
    known: dict[str, Any] = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    if peft_type in _SCALED:
        known |= {"r": config.get("r", 8), "lora_alpha": config.get(_SCALED[peft_type], 8)}
        keys = (*keys, "rank_pattern", "alpha_pattern", "use_rslora")
    return settings_of(known | {key: config[key] for key in keys if key in config})
