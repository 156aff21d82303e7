"""Constraint: one thing that an answer must match, and the grammar for it in llguidance's format.

The format is JSON; its parts are a JSON schema or a grammar in llguidance's dialect of Lark.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from deployments.ingress.structured.schema import Preparation, SchemaRefused
from engine.scheduler.request import MAX_GRAMMAR_BYTES

Kind = Literal["json", "regex", "choice", "grammar"]

MAX_CHOICES = 1024
# Between the tokens of JSON: enough to indent, not enough for a model to go on with it for ever
WHITESPACE = r"[ \n\r\t]{0,48}"


class ConstraintRefused(ValueError):
    """What is asked for is wrong or cannot be enforced; the message says where."""


@dataclass(frozen=True, slots=True)
class Constraint:
    kind: Kind
    value: Any
    path: str  # the field that it came in


@dataclass(frozen=True, slots=True)
class Grammar:
    """`not_enforced` lists keywords and their places, if leniency was asked for."""

    text: str
    not_enforced: tuple[str, ...] = ()


def to_grammar(constraint: Constraint, is_lenient: bool = False) -> Grammar:
    """Raises ConstraintRefused."""
    try:
        grammar = _grammar_of(constraint, is_lenient)
        num_bytes = len(grammar.text.encode())
    except RecursionError:
        raise ConstraintRefused("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ConstraintRefused("it has a character that UTF-8 cannot encode") from None
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise ConstraintRefused(
            f"it has {num_bytes} bytes without what only describes; at most {MAX_GRAMMAR_BYTES} "
            "are allowed"
        )
    return grammar


def _grammar_of(constraint: Constraint, is_lenient: bool) -> Grammar:
    if constraint.kind == "json":
        return _json_grammar(constraint.value, is_lenient)
    if constraint.kind == "choice":
        alternatives = " | ".join(_quoted(choice) for choice in constraint.value)
        return _lark_grammar(f"start: {alternatives}")
    if constraint.kind == "regex":
        return _lark_grammar(f"start: /{_delimited(constraint.value)}/")
    return _lark_grammar(constraint.value)


def _json_grammar(schema: object, is_lenient: bool) -> Grammar:
    preparation = Preparation(is_lenient)
    if isinstance(schema, str):
        schema = _parsed(schema)
    try:
        prepared = preparation.prepare(schema)
    except SchemaRefused as error:
        raise ConstraintRefused(str(error)) from None
    if prepared is False:
        raise ConstraintRefused("the schema false allows nothing")
    options = {"whitespace_pattern": WHITESPACE, "coerce_one_of": is_lenient}
    document = {"x-guidance": options, **(prepared if isinstance(prepared, dict) else {})}
    text = _dump({"grammars": [{"json_schema": document}]})
    return Grammar(text, tuple(preparation.not_enforced))


def _parsed(text: str) -> object:
    """Read a schema that was sent as a text, as vLLM allows it."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConstraintRefused(f"it is not JSON: {error}") from None


def _lark_grammar(lark: str) -> Grammar:
    return Grammar(_dump({"grammars": [{"lark_grammar": lark}]}))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _delimited(regex: str) -> str:
    """Escape what would end a regular expression between slashes: a slash, and the line's end."""
    parts: list[str] = []
    is_escaped = False
    for character in regex:
        if character == "/" and not is_escaped:
            parts.append("\\")
        is_escaped = character == "\\" and not is_escaped
        parts.append("\\n" if character == "\n" else character)
    return "".join(parts)


def _dump(document: object) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))
