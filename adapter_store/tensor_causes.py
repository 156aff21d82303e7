"""Say what a trainer has done where an adapter's file holds something else than factors."""

import re

from adapter_store.errors import AdapterInvalid
from adapter_store.safetensors_file import TensorEntry

_NAMES = re.compile(r"[!-~]+")
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
        raise AdapterInvalid(f"tensor {name!r} has a name with blanks or not in ASCII")
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
