"""Constraint: one thing that an answer must match, and the grammar for it in llguidance's format.

The format is JSON; its parts are a JSON schema or a grammar in llguidance's dialect of Lark.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec

from deployments.ingress.structured.calls import CallsRefused, ForcedCalls, calls_document
from deployments.ingress.structured.json_parts import WHITESPACE
from deployments.ingress.structured.lark import Lark, quoted, regex
from deployments.ingress.structured.schema import Preparation, SchemaRefused
from deployments.ingress.structured.structural_tag import Part, TagRefused, TokenIds, tag_document
from deployments.ingress.structured.thought import Thought
from engine.scheduler.request import MAX_GRAMMAR_BYTES

Kind = Literal["json", "regex", "choice", "grammar", "structural_tag", "calls", "framed"]

MAX_CHOICES = 1024
_ANSWER = "answer"  # the name of a grammar that others refer to


class ConstraintRefused(ValueError):
    """What is asked for is wrong or cannot be enforced; the message says where.

    `path` is the field, if it is another one than the constraint's own.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True, slots=True)
class Constraint:
    kind: Kind
    value: Any
    path: str  # the field that it came in


@dataclass(frozen=True, slots=True)
class Framed:
    """What an answer must match behind its reasoning, and calls that may stand there instead."""

    answer: Constraint
    thought: Thought
    calls: ForcedCalls | None = None


@dataclass(frozen=True, slots=True)
class Grammar:
    """`not_enforced` lists keywords and their places, if leniency was asked for."""

    text: str
    not_enforced: tuple[str, ...] = ()


def _no_tokens(texts: Iterable[str]) -> Mapping[str, int]:
    return {}


def to_grammar(
    constraint: Constraint, is_lenient: bool = False, ids_in: TokenIds = _no_tokens
) -> Grammar:
    """`ids_in` finds tokens that are parts of texts. Raises ConstraintRefused."""
    try:
        grammar = _grammar_of(constraint, is_lenient, ids_in)
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


def _grammar_of(constraint: Constraint, is_lenient: bool, ids_in: TokenIds) -> Grammar:
    if constraint.kind == "json":
        return _json_grammar(constraint.value, is_lenient)
    if constraint.kind == "structural_tag":
        return _tag_grammar(constraint, is_lenient, ids_in)
    if constraint.kind == "calls":
        return _calls_grammar(constraint.value, is_lenient)
    if constraint.kind == "framed":
        return _framed_grammar(constraint.value, is_lenient, ids_in)
    if constraint.kind == "choice":
        return _lark_grammar(f"start: {' | '.join(map(quoted, constraint.value))}")
    if constraint.kind == "regex":
        return _lark_grammar(f"start: {regex(constraint.value)}")
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


def _tag_grammar(constraint: Constraint, is_lenient: bool, ids_in: TokenIds) -> Grammar:
    tag = constraint.value
    tag = _parsed(tag) if isinstance(tag, str) else tag
    if not isinstance(tag, dict):
        raise ConstraintRefused("it must be an object")
    try:
        document, not_enforced = tag_document(cast(Part, tag), constraint.path, ids_in, is_lenient)
    except TagRefused as error:
        raise ConstraintRefused(str(error), error.path) from None
    return Grammar(_dump(document), tuple(not_enforced))


def _framed_grammar(framed: Framed, is_lenient: bool, ids_in: TokenIds) -> Grammar:
    answer = _grammar_of(framed.answer, is_lenient, ids_in)
    first, *more = json.loads(answer.text)["grammars"]
    frame = _frame(framed, is_lenient)
    grammars = [*json.loads(frame.text)["grammars"], {"name": _ANSWER, **first}, *more]
    return Grammar(_dump({"grammars": grammars}), frame.not_enforced + answer.not_enforced)


def _frame(framed: Framed, is_lenient: bool) -> Grammar:
    """Write what stands around an answer."""
    if framed.calls is not None:
        return _calls_grammar(framed.calls, is_lenient, f"@{_ANSWER}")
    lark = Lark(framed.thought.mark_ids)
    answer = framed.thought.answer(lark, f"@{_ANSWER}")
    return _lark_grammar(lark.text(f"{framed.thought.before(lark)} {answer}"))


def _calls_grammar(wanted: ForcedCalls, is_lenient: bool, otherwise: str = "") -> Grammar:
    try:
        document, not_enforced = calls_document(wanted, is_lenient, otherwise)
    except CallsRefused as error:
        raise ConstraintRefused(str(error), error.path) from None
    return Grammar(_dump(document), tuple(not_enforced))


def _dump(document: object) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))
