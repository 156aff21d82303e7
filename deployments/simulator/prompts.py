"""Prompt: token ids that nobody writes down, and that begin like others' where they should."""

from collections.abc import Sequence
from typing import overload

STRIDE = 2**15  # between the own tokens of two requests, so that no two begin alike
OWN_TOKENS = 2**31  # token ids below it are a request's own, those from it on are shared


class Prompt(Sequence[int]):
    """The tokens of some ranges, one after the other."""

    def __init__(self, parts: Sequence[range]) -> None:
        self._parts = parts
        self._length = sum(map(len, parts))

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, int):
            return self[index : index + 1 or None][0]
        start, stop, step = index.indices(self._length)
        found: list[int] = []
        for part in self._parts:
            found += part[max(start, 0) : max(stop, 0)]
            start, stop = start - len(part), stop - len(part)
        return found[::step]


def make_prompt(number: int, num_tokens: int, shared: Sequence[range] = ()) -> Sequence[int]:
    """Return the prompt of a request: what it shares, then tokens of its own."""
    start = number * STRIDE % OWN_TOKENS
    rest = range(start, start + num_tokens - sum(map(len, shared)))
    return Prompt((*shared, rest)) if shared else rest


def shared_range(key: int, num_tokens: int, stride: int) -> range:
    """Return the tokens of a text that is known by a number; `stride` is the longest one's size."""
    start = OWN_TOKENS + key * stride % OWN_TOKENS
    return range(start, start + num_tokens)
