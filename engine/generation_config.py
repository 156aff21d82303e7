"""Reads the generation settings of a model folder: end tokens and sampling defaults.

End tokens are those of generation_config.json, or else of config.json, and the tokenizer's own:
some chat models name the token that ends an answer only there.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine.model.families import read_json
from engine.model.spec import ModelError
from engine.scheduler.request import InvalidRequest, SamplingDefaults, SamplingParams

GENERATION = "generation_config.json"


def read_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Read the tokens that end a text, each once. Raises ModelError."""
    return tuple(dict.fromkeys((*read_named_eos_token_ids(folder), *_tokenizer_eos(folder))))


def read_named_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Read those of generation_config.json, or else of config.json. Raises ModelError."""
    for name in (GENERATION, "config.json"):
        found = _read(folder / name).get("eos_token_id")
        if found is not None:
            break
    named = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token_id) is int for token_id in named):
        raise ModelError(f"{folder / name}: eos_token_id={found!r} is no token id or list of them")
    return tuple(dict.fromkeys(named))


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """Read the values of requests that leave them out. Raises ModelError for one out of range."""
    path = folder / GENERATION
    raw = _read(path)
    names = [field.name for field in fields(SamplingDefaults)]
    found = {name: raw[name] for name in names if raw.get(name) is not None}
    for name, value in found.items():
        if type(value) not in ((int,) if name == "top_k" else (int, float)):
            kind = "whole number" if name == "top_k" else "number"
            raise ModelError(f"{path}: {name}={value!r} is no {kind}")
    if found.get("top_k") == -1:  # off, as some files write it
        found["top_k"] = 0
    try:
        SamplingParams(**found)
    except InvalidRequest as error:
        raise ModelError(
            f"{path}: {error}; `generation_config: none` of the model ignores its defaults"
        ) from error
    return SamplingDefaults(**found)


# ==== the tokenizer's end token ====


def _tokenizer_eos(folder: Path) -> tuple[int, ...]:
    """Look up the token's id, in small files first: tokenizer.json may have many megabytes."""
    config = _read(folder / "tokenizer_config.json")
    token = config.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return ()
    places: tuple[Callable[[], Iterator[tuple[int, Any]]], ...] = (
        lambda: _added_in_config(config),
        lambda: _known_in_file(_read(folder / "tokenizer.json")),
    )
    for place in places:
        for token_id, content in place():
            if content == text:
                return (token_id,)
    return ()


def _added_in_config(config: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    added = config.get("added_tokens_decoder")
    for token_id, token in added.items() if isinstance(added, dict) else ():
        if token_id.isdecimal() and isinstance(token, dict):
            yield int(token_id), token.get("content")


def _known_in_file(tokenizer: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    for token in tokenizer.get("added_tokens") or ():
        yield token.get("id"), token.get("content")
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if isinstance(vocabulary, dict):  # others are lists without names for end tokens
        for text, token_id in vocabulary.items():
            yield token_id, text


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file counts as an empty one."""
    return read_json(path) if path.exists() else {}
