"""Make a tokenizer of an adapter's own on its base's model, which both share: nothing is parsed.

To load a tokenizer with 150,000 tokens takes seconds, in which no other thread of Python runs.
"""

import json
from itertools import groupby
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer

from adapter_store.own_tokenizer import OwnTokenizer

_NO_MODEL: dict[str, Any] = {"type": "BPE", "vocab": {}, "merges": []}
_NOTHING: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": _NO_MODEL}


def on_model_of(base: Tokenizer, own: OwnTokenizer) -> Tokenizer:
    """Build it with the model of `base`, which must be the one that `own` was made for."""
    described: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "model": _NO_MODEL,
        **own.steps,
    }
    steps = Tokenizer.from_str(json.dumps(described))
    tokenizer = Tokenizer(cast(Any, base).model)
    for name, step in own.steps.items():
        if step is not None:
            setattr(tokenizer, name, getattr(steps, name))
    for is_special, tokens in groupby(own.added_tokens, lambda token: bool(token["special"])):
        added = [_added(dict(token)) for token in tokens]
        whole = cast(Any, tokenizer)  # its own types are incomplete
        (whole.add_special_tokens if is_special else whole.add_tokens)(added)
    tokenizer.encode_special_tokens = own.split_special_tokens
    return tokenizer


def _added(token: dict[str, Any]) -> AddedToken:
    del token["id"]  # which follows from the order
    return AddedToken(token.pop("content"), **token)
