"""ConfigKeys: reads keys of a JSON object with type checks, and rejects keys that were not read.

`finish` makes the check at the end; it allows keys that do not affect a forward pass, which are
listed here.
"""

from collections.abc import Collection, Mapping
from typing import Any, Final

from engine.model.spec import ModelError

REQUIRED: Final = object()

# Keys for bookkeeping, training and special tokens.
_BOOKKEEPING = """
_attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled
_name_or_path attention_dropout auto_map begin_suppress_tokens bos_token_id cache_implementation
dtype embd_pdrop eos_token_id finetuning_task forced_bos_token_id forced_eos_token_id id2label
initializer_range is_llama_config label2id name_or_path output_attentions output_hidden_states
pad_token_id prefix pretraining_tp problem_type resid_pdrop return_dict sep_token_id
suppress_tokens task_specific_params tf_legacy_loss tie_last_hidden_states tokenizer_class
torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed
unsloth_version use_bfloat16 use_cache
"""
# Sampling settings, which older files keep in config.json.
_GENERATION = """
bad_words_ids decoder_start_token_id diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length
min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
remove_invalid_values repetition_penalty return_dict_in_generate temperature top_k top_p
typical_p
"""
IRRELEVANT = frozenset((_BOOKKEEPING + _GENERATION).split())

# Keys that have no effect in any model with these values, but would with others.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
}


class ConfigKeys:
    """Typed readers of one JSON object. A key without a default must be present."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._raw = raw
        self._taken: set[str] = set()

    def take(self, key: str, default: Any) -> Any:
        self._taken.add(key)
        return self._raw.get(key, default)

    def require(self, *keys: str) -> None:
        """Raise if a key is absent, for keys whose default in a family ignores the other sizes."""
        for key in keys:
            if key not in self._raw:
                raise self.error(key, REQUIRED, "there")

    def integer(self, key: str, default: Any = REQUIRED, low: int = 1) -> int:
        value = self.take(key, default)
        if type(value) is not int or value < low:
            raise self.error(key, value, f"an integer of at least {low}")
        return value

    def optional_integer(self, key: str, default: int | None) -> int | None:
        return None if self.take(key, default) is None else self.integer(key, default)

    def number(self, key: str, default: Any = REQUIRED) -> float:
        value = self.take(key, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.error(key, value, "a number above 0")
        return float(value)

    def optional_number(self, key: str, default: float | None) -> float | None:
        return None if self.take(key, default) is None else self.number(key, default)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.take(key, REQUIRED)
        if not isinstance(value, list) or not all(type(x) in (int, float) for x in value):
            raise self.error(key, value, "a list of numbers")
        return tuple(float(x) for x in value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if type(value) is not bool:
            raise self.error(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = REQUIRED) -> str:
        value = self.take(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a text")
        return value

    def mapping(self, key: str) -> dict[str, Any] | None:
        value = self.take(key, None)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, value, "an object")
        return value

    def finish(self, neutral: Mapping[str, Collection[Any]], irrelevant: Collection[str]) -> None:
        """Raise for keys that were not read, unless neutral, irrelevant or null (unset)."""
        for key, value in self._raw.items():
            if key in self._taken or key in irrelevant or value is None:
                continue
            if key not in neutral:
                raise ModelError(f"{self.where}: {key}={value!r} is not supported")
            if value not in neutral[key]:
                allowed = ", ".join(map(repr, neutral[key])) or "null"
                raise self.error(key, value, allowed)

    def error(self, key: str, value: object, allowed: str) -> ModelError:
        if value is REQUIRED:
            return ModelError(f"{self.where}: {key} is missing; it must be {allowed}")
        return ModelError(f"{self.where}: {key}={value!r} is not supported; it must be {allowed}")
