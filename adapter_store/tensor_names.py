"""Read the names that PEFT gives to an adapter's tensors: of which module, and what of it.

Knows no config and no shapes. A name that fits no pattern is another's, and is refused elsewhere.
"""

import re
from collections.abc import Collection
from enum import StrEnum


class Role(StrEnum):
    """What a tensor is of its module; the value is how PEFT calls it."""

    A = "lora_A"
    B = "lora_B"
    B_BIAS = "lora_B.bias"  # added behind B, and scaled like it
    MAGNITUDE = "lora_magnitude_vector"  # of DoRA: the norm of each row of the weight
    BIAS = "bias"  # the base's own, trained
    EMBEDDING_A = "lora_embedding_A"  # of token embeddings, a column for each id
    EMBEDDING_B = "lora_embedding_B"
    TOKENS = "trainable_tokens_delta"  # rows of some token ids, not their differences
    WEIGHT = "weight"  # instead of the base's own


# Saved by a library before 0.5 or by one's own code, a name may still have the adapter's own
_PATTERNS = {
    Role.A: r"\.lora_A(?:\.default)?\.weight",
    Role.B: r"\.lora_B(?:\.default)?\.weight",
    Role.B_BIAS: r"\.lora_B(?:\.default)?\.bias",
    Role.MAGNITUDE: r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    Role.BIAS: r"(?:\.base_layer)?\.bias",
    Role.EMBEDDING_A: r"\.lora_embedding_A(?:\.default)?",
    Role.EMBEDDING_B: r"\.lora_embedding_B(?:\.default)?",
    Role.TOKENS: r"(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?",
    Role.WEIGHT: r"(?:\.modules_to_save(?:\.default)?|\.token_adapter)?(?:\.base_layer)?\.weight",
}
# Of a saved embedding or output layer, PEFT may write two more, and reads the plain name alone
_COPY = re.compile(
    r"(?P<module>.*(?:embed_tokens|lm_head))\.(?:modules_to_save|original_module)\.weight"
)
_NAMES = {role: re.compile(rf"(?P<module>[^.].*?){end}") for role, end in _PATTERNS.items()}


def parse_tensor_name(name: str) -> tuple[str, Role] | None:
    """Split <module>.lora_A.weight into (<module>, Role.A); None if unknown."""
    for role, pattern in _NAMES.items():
        if match := pattern.fullmatch(name):
            return match["module"], role
    return None


def is_copy(name: str, names: Collection[str]) -> bool:
    """Check for a tensor that PEFT writes beside a module's weight and does not read again."""
    match = _COPY.fullmatch(name)
    return match is not None and f"{match['module']}.weight" in names
