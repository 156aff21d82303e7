"""Check that two models compute alike but for their weights, as far as their configs say."""

from collections.abc import Mapping
from typing import Any

from adapter_store.conversion.model_weights import nested
from adapter_store.errors import AdapterInvalid

# Differences without effect on the logits, or that are compared otherwise
_KEYS = """
_name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id
initializer_range max_length max_position_embeddings output_attentions output_hidden_states
pad_token_id pretraining_tp quantization_config return_dict rope_parameters rope_scaling
tie_word_embeddings tokenizer_class torch_dtype transformers_version unsloth_fixed unsloth_version
use_cache use_return_dict vocab_size
"""
_FREE = frozenset(_KEYS.split())


def check_configs(tuned: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Raise AdapterInvalid with the first key whose two values compute differently.

    A key that one of them lacks is not compared: versions of transformers write different ones.
    """
    ours, theirs = ({**config, **_rope(config)} for config in (tuned, base))
    for key in sorted(ours.keys() & theirs.keys() - _FREE):
        if ours[key] != theirs[key] and not key.endswith("dropout"):
            raise AdapterInvalid(
                f"config.json has {key}={ours[key]!r}, and that of the base {theirs[key]!r}: an "
                "adapter changes weights alone, so serve the model as a base"
            )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read what transformers 4 writes as rope_theta and rope_scaling, and 5 as rope_parameters."""
    scaling = {**nested(config, "rope_scaling"), **nested(config, "rope_parameters")}
    if any(isinstance(value, dict) for value in scaling.values()):
        return {"rope_parameters of each kind of layer": scaling}
    theta = scaling.pop("rope_theta", config.get("rope_theta"))
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    found: dict[str, Any] = {"rope": (kind, scaling)}
    if theta is not None:
        found["rope_theta"] = theta
    if (part := scaling.pop("partial_rotary_factor", None)) is not None:
        found["partial_rotary_factor"] = part
    return found
