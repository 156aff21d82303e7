"""Folders of tokenizers on the same bytes, as trainers save them with adapters."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.deployments.support.fakes import byte_tokenizer

NAMES = {"eos_token": "<eos>", "pad_token": "<pad>"}


def save_tokenizer(
    folder: Path, tokenizer: Tokenizer, names: Mapping[str, str] = NAMES, **config: Any
) -> Path:
    """Save it with transformers, `config` on top of what that writes."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    if config:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def with_tokens(*special: str, plain: tuple[str, ...] = ()) -> Tokenizer:
    """Add tokens to the bytes: the first gets the id 258."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.add_tokens([AddedToken(text) for text in plain])
    return tokenizer
