"""Builds Hypothesis strategies for the contents of messages, from their annotations."""

import types
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st

from engine import config
from engine.config import EngineConfig
from engine.scheduler.request import POOLINGS, SamplingParams

INTS = st.integers(-(2**63), 2**63 - 1)
PAIRS = st.tuples(st.integers(0, 2**31 - 1), st.floats(-100, 100))

# Types whose fields have their own ranges.
KNOWN: dict[Any, st.SearchStrategy[Any]] = {
    int: INTS,
    float: st.floats(allow_nan=False),
    str: st.text(max_size=20),
    bool: st.booleans(),
    bytes: st.binary(max_size=20),
    type(None): st.none(),
    SamplingParams: st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 2**31 - 1),
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 2**31 - 1),
        top_p=st.floats(0, 1, exclude_min=True),
        presence_penalty=st.floats(-2, 2),
        logit_bias=st.lists(PAIRS, max_size=3).map(tuple),
        seed=INTS,
        stop_token_ids=st.lists(INTS, max_size=3).map(tuple),
        ignore_eos=st.booleans(),
        logprobs=st.none() | st.integers(0, 20),
        pooling=st.none() | st.sampled_from(POOLINGS),
    ),
    EngineConfig: st.builds(
        EngineConfig,
        source=st.text(max_size=20),
        dtype=st.sampled_from(config.DTYPES),
        memory_bytes=st.none() | st.integers(2**12, 2**50),
        enable_prefix_caching=st.booleans(),
    ),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for an annotation: a dataclass, a message, or a container of them."""
    if hint in KNOWN:
        return KNOWN[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return st.one_of([values(a) for a in arguments])
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if issubclass(hint, Enum):
        return st.sampled_from(hint)
    return st.builds(hint, **{name: values(each) for name, each in hints_of(hint).items()})


def hints_of(kind: Any) -> dict[str, Any]:
    """Return every field of a dataclass or message with its annotation."""
    names = [f.name for f in (fields(kind) if is_dataclass(kind) else msgspec.structs.fields(kind))]
    hints = get_type_hints(kind)
    return {name: hints[name] for name in names}
