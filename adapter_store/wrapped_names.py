"""Find the plain name of a module behind what trainers' wrappers have put into it.

    wrapped   as the file has it        _orig_mod.model.language_model.layers.0.mlp.up_proj
    trained   without torch's wrappers  model.language_model.layers.0.mlp.up_proj
    plain     as the base has it        model.layers.0.mlp.up_proj

Patterns of the config were matched with one of these when the adapter was made.
"""

import re

from adapter_store.errors import AdapterInvalid
from adapter_store.peft_config import LoraSettings

PREFIX = "base_model.model."
# DDP, FSDP, DeepSpeed and activation checkpointing wrap modules after PEFT has matched their names
_LATE = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_LATE_WRAPPER = re.compile(rf"(?:^module\.)|(?<![^.])(?:{'|'.join(_LATE)})\.")
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # torch.compile may do so before
_PREFIXED = re.compile(
    rf"(?:(?:module|model|_orig_mod|{'|'.join(_LATE)})\.)*base_model\.model\.(.*)"
)
# The text model of a multimodal one, as transformers calls it since 4.52 and did before
_TEXT_MODEL = re.compile(r"(?:model\.)?(?:language_model|text_model|llm)\.(?:model\.)?(.+)")
_SIBLINGS = re.compile(
    r"(?<![^.])(?:vision_tower|vision_model|visual|vision_embed_tokens|audio_tower|audio_model|"
    r"multi_modal_projector|mm_projector|img_processor|embed_vision|embed_audio|resampler|"
    r"connector)\."
)


def without_prefix(name: str) -> str:
    """Drop PEFT's prefix from a tensor's name, and wrappers before it. Raises AdapterInvalid."""
    match = _PREFIXED.fullmatch(name)
    rest = name if match is None else match[1]
    if PREFIX in rest:
        raise AdapterInvalid(
            f"tensor {name} comes from an adapter that was trained on top of another one: merge "
            "the first into the base (merge_and_unload) and serve the result as a base"
        )
    return rest


def trained_name(wrapped: str) -> str:
    """Drop torch's wrappers from the name of a module or tensor."""
    return _LATE_WRAPPER.sub("", _COMPILED.sub("", wrapped))


def plain_name(wrapped: str) -> str:
    """Name a module or tensor as a model of text alone does. Raises AdapterInvalid."""
    name = trained_name(wrapped)
    if found := _SIBLINGS.search(name):
        raise AdapterInvalid(
            f"{name} belongs to the part of a multimodal model that sees or hears "
            f"({found[0][:-1]}), and models are served for text alone: train with that part frozen "
            "(unsloth: finetune_vision_layers=False, PEFT: exclude_modules), or leave its tensors "
            "out of the file if its inputs are not needed"
        )
    match = _TEXT_MODEL.fullmatch(name)
    if match is None:
        return name
    return match[1] if match[1].startswith("lm_head") else f"model.{match[1]}"


def whole_name(plain: str) -> str:
    """Name a module as a model with an output layer does, also one of a model without."""
    is_bare = plain.startswith(("layers.", "embed_tokens", "norm."))
    return f"model.{plain}" if is_bare else plain


def configured_name(wrapped: str, settings: LoraSettings) -> str:
    """Return the name of a module under which the config's patterns mean it.

    Whether it was compiled before they were matched is not known, so they must not distinguish by
    that. Raises AdapterInvalid.
    """
    trained, plain = trained_name(wrapped), plain_name(wrapped)
    compiled = _LATE_WRAPPER.sub("", wrapped)
    selected = [name for name in (trained, compiled) if settings.targets.include(name)]
    if len({settings.effect(name) for name in selected}) > 1:
        raise AdapterInvalid(
            f"the settings for {wrapped} change if _orig_mod, which torch.compile has put into its "
            "name, is left out: leave it out of the patterns too"
        )
    return selected[0] if selected else plain
