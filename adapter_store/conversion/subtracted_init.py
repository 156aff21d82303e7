"""Make LoRA of an adapter whose start was taken out of the base: PiSSA, OLoRA, CorDA, LoRA-GA.

Training began at W - s B0 A0 plus s B0 A0. Over the base W the adapter is therefore
s (B A - B0 A0): both pairs side by side, the initial one with the opposite sign.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapter_store.conversion.change import Change, Factors, Saved
from adapter_store.conversion.methods import Method
from adapter_store.conversion.peft_upload import PeftUpload
from adapter_store.conversion.setting import ReadWeight, Setting, Tensors, check_rank
from adapter_store.errors import AdapterInvalid
from adapter_store.peft_config import IGNORED_KEYS, read_config

_INITS = ("pissa", "olora", "corda", "lora_ga")


def _pair(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
    check_rank(setting, a)
    return Factors(a, b, ("F32", "F32"), setting.scaling)


# Other keys are refused where they are set
_LORA = Method(
    ("lora_A.weight", "lora_B.weight"),
    _pair,
    ("lora_alpha", "use_rslora", "init_lora_weights", "qalora_group_size", *IGNORED_KEYS),
)


def changes_base(config: Mapping[str, Any]) -> bool:
    """Check whether a LoRA configuration's start was subtracted from the base."""
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower().startswith(_INITS)


class SubtractedInit:
    """A Source: the trained adapter minus the initial one. Raises AdapterInvalid."""

    def __init__(self, folder: Path, config: Mapping[str, Any], initial: Path | None) -> None:
        init = config.get("init_lora_weights")
        if initial is None:
            raise AdapterInvalid(
                f"init_lora_weights={init!r} also changed the base's weights: give the adapter as "
                "it was before training (save_pretrained right after get_peft_model) with "
                "--initial-adapter"
            )
        self.name = str(init).upper()
        self._trained = PeftUpload(folder, config, None, _LORA)
        self._initial = PeftUpload(initial, read_config(initial), None, _LORA)
        self.modules = self._trained.modules
        differing = sorted(set(self.modules) ^ set(self._initial.modules))
        if differing:
            raise AdapterInvalid(f"{differing[0]} is in one of the two adapters alone")

    def change(self, module: str, shape: tuple[int, int]) -> Change:
        after, before = self._trained.change(module, shape), self._initial.change(module, shape)
        assert isinstance(after, Factors) and isinstance(before, Factors)
        if after.scaling != before.scaling or after.a.shape != before.a.shape:
            raise AdapterInvalid(f"{module} has another rank or scaling in the initial adapter")
        a = np.concatenate([after.a, before.a])
        b = np.concatenate([after.b, -before.b], axis=1)
        return Factors(a, b, ("F32", "F32"), after.scaling)

    def saved(self) -> Iterator[Saved]:
        return self._trained.saved()
