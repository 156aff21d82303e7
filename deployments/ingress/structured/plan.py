"""Turns a request's constraint into the grammar of its answers, beside the event loop."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote

from deployments.ingress.http_errors import invalid
from deployments.ingress.structured.constraint import (
    Constraint,
    ConstraintRefused,
    Grammar,
    to_grammar,
)
from deployments.ingress.structured.structural_tag import TokenIds

NOT_ENFORCED = "x-reef-not-enforced"
MAX_HEADER = 2048


async def plan_grammar(
    constraint: Constraint | None, is_lenient: bool, ids_in: TokenIds
) -> Grammar | None:
    """Raises ApiError, with the field and the place in it."""
    if constraint is None:
        return None
    try:
        return await asyncio.to_thread(to_grammar, constraint, is_lenient, ids_in)
    except ConstraintRefused as error:
        path = error.path or constraint.path
        raise invalid(f"{path}: {error}.", path) from None


def within(vocab_size: int, ids_in: TokenIds) -> TokenIds:
    """Refuse marks that are tokens of an adapter alone: grammars are made of its base's."""

    def found_in(texts: Iterable[str]) -> Mapping[str, int]:
        found = ids_in(texts)
        for text, token_id in found.items():
            if token_id >= vocab_size:
                raise ConstraintRefused(
                    f"{text!r} is token {token_id}, which only the adapter has, and structured "
                    "output is made of its base's tokens"
                )
        return found

    return found_in


def grammar_headers(grammar: Grammar | None) -> dict[str, str]:
    """Say in a header what a lenient grammar does not enforce."""
    if grammar is None or not grammar.not_enforced:
        return {}
    return {NOT_ENFORCED: _header(grammar.not_enforced)}


def _header(entries: Sequence[str]) -> str:
    text = "; ".join(quote(entry, safe=" /$()~-_.") for entry in entries)
    return text if len(text) <= MAX_HEADER else f"{text[:MAX_HEADER]}..."
