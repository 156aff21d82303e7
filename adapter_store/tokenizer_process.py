"""Inspect a tokenizer.json in a process of its own, which prints one line of JSON.

Who publishes adapters is not trusted with the memory and the time of the process that publishes,
and parsing many megabytes of JSON would stop every thread of it.

    python -m adapter_store.tokenizer_process < tokenizer.json
"""

import hashlib
import json
import resource
import sys
from typing import Any, cast

import msgspec
from tokenizers import Tokenizer

MEMORY_BYTES = 2 * 2**30
CPU_S = 60
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_NO_MODEL: dict[str, Any] = {"type": "BPE", "vocab": {}, "merges": []}


def inspect(raw: bytes) -> dict[str, Any]:
    """Split a tokenizer.json into its model, of which a hash is returned, and all else.

    Raises ValueError and whatever else a damaged file leads to.
    """
    document: dict[str, Any] = msgspec.json.decode(raw)
    model = _canonical_model(document["model"])
    added: list[dict[str, Any]] = sorted(document.get("added_tokens") or (), key=_token_id)
    _check_ids(added, _vocabulary(model))
    encoded = msgspec.json.encode(model, order="deterministic")
    return {
        "model_sha256": hashlib.sha256(encoded).hexdigest(),
        "added_tokens": [_canonical_token(token) for token in added],
        **_canonical_steps({name: document.get(name) for name in STEPS}),
    }


def _canonical_model(model: dict[str, Any]) -> dict[str, Any]:
    """Write a model as every version of the library would: options that are off are left out."""
    options = {name: value for name, value in model.items() if value or name == "vocab"}
    if "merges" in model:
        options.setdefault("type", "BPE")  # as old files leave it out
        merges = cast("list[str | list[str]]", model["merges"])
        options["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
    return options


def _canonical_token(token: dict[str, Any]) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    marks = {flag: bool(token.get(flag)) for flag in flags}
    return {"id": _token_id(token), "content": str(token["content"]), **marks}


def _canonical_steps(steps: dict[str, Any]) -> dict[str, Any]:
    """Read the steps with the library, which refuses what it does not know, and write them anew."""
    whole: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": _NO_MODEL, **steps}
    written: dict[str, Any] = json.loads(Tokenizer.from_str(json.dumps(whole)).to_str())
    return {name: written[name] for name in STEPS}


def _token_id(token: dict[str, Any]) -> int:
    return int(token["id"])


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return cast("dict[str, int]", vocabulary)
    pairs = cast("list[tuple[str, float]]", vocabulary)  # Unigram's
    return {text: at for at, (text, _) in enumerate(pairs)}


def _check_ids(added: list[dict[str, Any]], vocabulary: dict[str, int]) -> None:
    """Check that added tokens have the ids that the library gives them, in their order."""
    next_id = len(vocabulary)
    for token in added:
        text, listed = token["content"], _token_id(token)
        given = vocabulary.get(text, next_id)
        if listed != given:
            raise ValueError(f"added token {text!r} has the id {listed}, and would get {given}")
        next_id = max(next_id, given + 1)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    try:
        answer = inspect(sys.stdin.buffer.read())
    except BaseException as error:  # a panic of the library's Rust is no Exception
        answer = {"refused": f"{type(error).__name__}: {str(error)[:300]}"}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
