"""Say what a trainer has done where an adapter's file holds something else than factors."""

import re
from collections.abc import Iterable

from adapter_store.errors import AdapterInvalid
from adapter_store.safetensors_file import TensorEntry

_LAYER = re.compile(r"(?<![^.])layers\.(\d{1,9})\.")
_NAMES = re.compile(r"[!-~]{1,1000}")
_CAUSES = (
    (
        re.compile(r"\.lora_[AB]\.(?P<adapter>[^.]+)\.weight"),
        "; it is the adapter {adapter!r} of a state_dict: save it with "
        "save_pretrained(selected_adapters=[{adapter!r}])",
    ),
    (
        re.compile(r"\.lora_[ab]$"),
        "; MLX names it like that: publish MLX's own folder (adapter_config.json, "
        "adapters.safetensors) with --convert",
    ),
    (
        re.compile(r"\.lora_(?:up|down)\."),
        "; kohya's tools and diffusers name it like that: save a PEFT adapter",
    ),
    (
        re.compile(r"\.(?:hada_|lokr_|vera_|oft_|boft_)"),
        "; it is of another method, which peft_type must name: publish it with --convert",
    ),
)


def refuse_broken(name: str, tensor: TensorEntry) -> None:
    """Raise AdapterInvalid for what no trainer wanted to save, with the cause and the way out."""
    if _NAMES.fullmatch(name) is None:
        raise AdapterInvalid(
            f"tensor {name[:100]!r} has a name with blanks, or not in ASCII, or of more than 1000 "
            "characters"
        )
    if "_flat_param" in name:
        raise AdapterInvalid(
            f"tensor {name} is a shard that FSDP has flattened: save the adapter with "
            "StateDictType.FULL_STATE_DICT (accelerate: fsdp_state_dict_type FULL_STATE_DICT)"
        )
    if tensor.num_elements == 0:
        raise AdapterInvalid(
            f"tensor {name} {list(tensor.shape)} is empty, as shards are that DeepSpeed's ZeRO-3 "
            "did not gather: save the adapter with stage3_gather_16bit_weights_on_model_save, or "
            "gather its parameters (deepspeed.zero.GatheredParameters) first"
        )


def cause_of(name: str) -> str:
    """Return how a tensor came by a name that is no factor's, and the way out; "" if unknown."""
    for pattern, cause in _CAUSES:
        if match := pattern.search(name):
            return cause.format(**match.groupdict())
    return ""


def unknown_module(name: str, base_modules: Iterable[str]) -> str:
    """Say that the base has no such module to adapt, and why, as far as the names tell."""
    text = f"{name} is not a module of the base that can carry an adapter"
    num_layers = 1 + max((_layer(module) for module in base_modules), default=-1)
    if _layer(name) >= num_layers:
        return f"{text}: the base has {num_layers} layers, so the adapter is of a larger model"
    if ".experts." in name or name.endswith((".router", ".gate")):
        return f"{text}: it belongs to a mixture of experts"
    return text


def _layer(name: str) -> int:
    found = _LAYER.search(name)
    return int(found[1]) if found else -1
