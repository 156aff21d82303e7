"""Find from which position on an adapter acts.

Most adapters act on every token. An activated LoRA (aLoRA) acts from the first token of the last
place on where the prompt has its invocation tokens, and not at all if there is none: everything
before it is the base model's.
"""

from collections.abc import Sequence

NEVER = 2**62  # a position that no token has


def adapter_start(prompt_token_ids: Sequence[int], invocation_token_ids: Sequence[int]) -> int:
    """Return the first position on which the adapter acts: 0 without invocation tokens."""
    if not invocation_token_ids:
        return 0
    start = _last_place(prompt_token_ids, invocation_token_ids)
    return NEVER if start is None else start


def _last_place(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Find the last place of `wanted` in `tokens`, in linear time whatever repeats in them.

    By Knuth, Morris and Pratt, from the end: a prompt is as long as a client makes it.
    """
    mirrored = wanted[::-1]
    fallbacks, matched = [0], 0
    for token in mirrored[1:]:
        matched = _matched(mirrored, fallbacks, matched, token)
        fallbacks.append(matched)
    matched = 0
    for at in range(len(tokens) - 1, -1, -1):
        matched = _matched(mirrored, fallbacks, matched, tokens[at])
        if matched == len(wanted):
            return at
    return None


def _matched(wanted: Sequence[int], fallbacks: list[int], matched: int, token: int) -> int:
    """Return how much of `wanted` is matched with one token more."""
    while matched and wanted[matched] != token:
        matched = fallbacks[matched - 1]
    return matched + 1 if wanted[matched] == token else 0
