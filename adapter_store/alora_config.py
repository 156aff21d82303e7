"""Read what switches an activated LoRA (aLoRA) on, from its adapter_config.json."""

from typing import Any, cast

from adapter_store.errors import AdapterInvalid

MAX_INVOCATION_TOKENS = 1024
# Keys that PEFT does not combine with aLoRA, or that change what is before the invocation tokens.
WITHOUT_ALORA = (
    *("bias", "use_dora", "use_bdlora", "use_qalora", "target_parameters", "modules_to_save"),
    *("trainable_token_indices", "layer_replication", "arrow_config", "kasa_config"),
    *("monteclora_config", "velora_config"),
)


def read_invocation(config: dict[str, Any]) -> tuple[int, ...]:
    """Return the tokens from which on the adapter acts; empty if it acts on all.

    PEFT takes an empty list as none. Raises AdapterInvalid.
    """
    value: Any = config.get("alora_invocation_tokens") or []
    if not isinstance(value, list) or len(cast("list[Any]", value)) > MAX_INVOCATION_TOKENS:
        raise AdapterInvalid(
            f"alora_invocation_tokens={_shortened(value)} must be a list of at most "
            f"{MAX_INVOCATION_TOKENS} token ids"
        )
    for token_id in cast("list[Any]", value):
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise AdapterInvalid(
                f"alora_invocation_tokens: {_shortened(token_id)} is no token id, a whole number "
                "in 0..2**31-1"
            )
    if value:
        _refuse_beside_alora(config)
    return tuple(cast("list[int]", value))


def _refuse_beside_alora(config: dict[str, Any]) -> None:
    for key in WITHOUT_ALORA:
        if config.get(key) not in (None, False, [], "none"):
            raise AdapterInvalid(
                f"alora_invocation_tokens and {key}={_shortened(config[key])} are not served "
                "together: what is before the invocation tokens must be the base model's alone"
            )


def _shortened(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."
