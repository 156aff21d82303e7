"""Foretell which parts of a tokenizer.json transformers 5's AutoTokenizer replaces.

Some of its classes take only the vocabulary and the merges from the file, and bring a normalizer, a
pre-tokenizer and options of the model of their own. Which class it is follows from the folder's
`tokenizer_class`, the model type and, for Llama's, the file. Known here are the model types that
are served and the classes that their folders usually name; transformers itself is not imported.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Normalizer, Replace
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, PreTokenizer, Sequence, Split

from adapter_store.chat_template import read_tokenizer_config
from adapter_store.tokenizer_steps import QWEN2_WORDS

_CLASS_OF_TYPE = {
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
_TYPES_READ_FROM_FILE = ("granite", "mistral", "phi3")  # whatever class the folder names
_TYPES_OF_ONE_CLASS = ("qwen2",)  # whatever class the folder names
_CLASSES_READ_FROM_FILE = ("PreTrainedTokenizer", "PythonBackend", "TokenizersBackend")
_BYTE_LEVEL = '"ByteLevel"'

# Options of the model that change how ordinary text is cut, as far as they are not off.
_OPTIONS = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")


@dataclass(frozen=True, slots=True)
class _Build:
    """What a class brings of its own."""

    normalizer: Normalizer | None
    pre_tokenizer: PreTokenizer
    options: Mapping[str, object] = field(default_factory=dict[str, object])


def describe_difference(folder: Path, tokenizer: Tokenizer) -> str | None:
    """Say how AutoTokenizer's tokenizer differs from this one, the file's; None if it does not."""
    config, model = read_tokenizer_config(folder), _read_model_config(folder)
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    model_type = str(model.get("model_type"))
    is_byte_level = _BYTE_LEVEL in (folder / "tokenizer.json").read_text()
    name = class_taken(declared, model_type, is_byte_level)
    parts = _missing_tokens(config, tokenizer)
    if name is not None:
        build = _build(name, config)
        if build is None:
            parts.append("perhaps any part, since that class is not known here")
        else:
            parts = _other_parts(build, tokenizer) + parts
    if not parts:
        return None
    return (
        f"transformers 5 reads {folder} (tokenizer_class {declared}, model_type {model_type}) as "
        f"{name or 'the file says'}, and there differ from its tokenizer.json: {', '.join(parts)}"
    )


def class_taken(declared: str | None, model_type: str, is_byte_level: bool) -> str | None:
    """Name the class that AutoTokenizer takes; None for one that takes the whole file."""
    usual = _CLASS_OF_TYPE.get(model_type)
    name = (declared or "").removesuffix("Fast")
    if model_type in _TYPES_READ_FROM_FILE:
        return None
    if not name or model_type in _TYPES_OF_ONE_CLASS:
        return usual
    if name in _CLASSES_READ_FROM_FILE or (name == "LlamaTokenizer" and is_byte_level):
        return None
    return name


def _build(name: str, config: Mapping[str, Any]) -> _Build | None:
    spaced = config.get("add_prefix_space")
    if name == "GPT2Tokenizer":
        return _Build(None, ByteLevel(add_prefix_space=bool(spaced)))
    if name == "Qwen2Tokenizer":
        words = Split(Regex(QWEN2_WORDS), "isolated")
        rest = ByteLevel(add_prefix_space=bool(spaced), use_regex=False)
        return _Build(NFC(), Sequence([words, rest]))
    if name == "GemmaTokenizer":
        words = Split(" ", "merged_with_previous")
        return _Build(Replace(" ", "\u2581"), words, {"byte_fallback": True})
    if name == "LlamaTokenizer":
        scheme = "always" if config.get("legacy") else "first"
        scheme = "never" if spaced is False else scheme
        spaces = Metaspace(replacement="\u2581", prepend_scheme=scheme, split=False)
        return _Build(None, spaces, {"byte_fallback": True})
    return None


def _other_parts(build: _Build, tokenizer: Tokenizer) -> list[str]:
    file = cast(Any, tokenizer)  # its own types are incomplete
    parts: list[str] = []
    if _flat(build.normalizer) != _flat(file.normalizer):
        parts.append("normalizer")
    if _flat(build.pre_tokenizer) != _flat(file.pre_tokenizer):
        parts.append("pre_tokenizer")
    if not isinstance(file.model, BPE):
        return [*parts, "model"]
    for option in _OPTIONS:
        if (getattr(file.model, option) or False) != build.options.get(option, False):
            parts.append(f"model.{option}")
    return parts


def _missing_tokens(config: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Name added tokens that only tokenizer_config.json has."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = cast("dict[str, dict[str, Any]]", config.get("added_tokens_decoder") or {})
    missing = sorted({str(token["content"]) for token in listed.values()} - known)
    return [f"added tokens {', '.join(missing)}"] if missing else []


def _flat(part: Normalizer | PreTokenizer | None) -> list[dict[str, Any]]:
    """List a part's steps. What only places tokens in the text is left out."""
    return [] if part is None else _steps(json.loads(cast(Any, part).__getstate__()))


def _steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] == "Sequence":
        inner: list[dict[str, Any]] = state.get("normalizers") or state.get("pretokenizers") or []
        return [step for each in inner for step in _steps(each)]
    return [{key: value for key, value in state.items() if key != "trim_offsets"}]


def _read_model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}
