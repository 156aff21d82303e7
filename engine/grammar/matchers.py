"""Matchers: what outputs may continue with, by llguidance. Only its own processes import this."""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.grammar.mask_memory import MaskMemory

TABLE_NICENESS = 10  # the table is built while the engine loads its model

_LIMITS = LLParserLimits()


def build_table(tokenizer_path: str, vocab_size: int, eos_token_id: int) -> LLTokenizer:
    """Build the table of a model's tokens, after more urgent work. Raises ValueError."""
    built: list[LLTokenizer | BaseException] = []

    def build() -> None:
        # Of this thread alone: later ones are as urgent as the steps that wait for them
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), TABLE_NICENESS)
        try:
            built.append(_build_table(tokenizer_path, vocab_size, eos_token_id))
        except BaseException as error:  # a panic of its Rust is no Exception
            built.append(error)

    thread = threading.Thread(target=build)
    thread.start()
    thread.join()
    [table] = built
    if isinstance(table, BaseException):
        raise ValueError(str(table)) from table
    return table


def _build_table(tokenizer_path: str, vocab_size: int, eos_token_id: int) -> LLTokenizer:
    try:
        return LLTokenizer(tokenizer_path, n_vocab=vocab_size, eos_token=eos_token_id)
    except ValueError:  # the tokenizer has more tokens than the model
        return LLTokenizer(tokenizer_path, eos_token=eos_token_id)


def new_matcher(table: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile a grammar. Raises ValueError."""
    matcher = LLMatcher(table, grammar, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def advance(matcher: LLMatcher, token_ids: Sequence[int], eos_token_ids: Sequence[int]) -> None:
    """Go on with tokens of the output. Raises ValueError for one that may not follow."""
    for token_id in token_ids:
        known_id = eos_token_ids[0] if token_id in eos_token_ids else token_id
        if not matcher.consume_token(known_id):
            raise ValueError(matcher.get_error() or f"token {token_id} may not follow")


def next_mask(matcher: LLMatcher, eos_token_ids: Sequence[int]) -> bytearray:
    """Compute which tokens may follow, a bit for each. Raises ValueError.

    llguidance knows one end token: where it may follow, all of the model's may.
    """
    mask = bytearray(matcher.compute_bitmask())
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    first, *others = eos_token_ids
    if mask[first // 8] >> first % 8 & 1:
        for token_id in others:
            mask[token_id // 8] |= 1 << token_id % 8
    return mask


@dataclass(slots=True)
class _Running:
    """A matcher, and the tokens that it has gone on with before it was told them."""

    matcher: LLMatcher
    mask: bytearray | None = None  # of what may follow all these; None: not computed yet
    ahead: list[int] = field(default_factory=list[int])


class Matchers:
    """The matchers of running requests, one in each slot of `memory` that is in use."""

    def __init__(
        self, table: LLTokenizer, eos_token_ids: Sequence[int], memory: MaskMemory
    ) -> None:
        self._table = table
        self._eos_token_ids = tuple(eos_token_ids)
        self._memory = memory
        self._kept: dict[int, LLMatcher] = {}  # by grammar_id, at their beginnings
        self._by_slot: dict[int, _Running] = {}

    def keep(self, grammar_id: int, grammar: str) -> None:
        """Compile a grammar for matchers to come; may run in any thread. Raises ValueError."""
        self._kept[grammar_id] = new_matcher(self._table, grammar)

    def drop(self, grammar_id: int) -> None:
        self._kept.pop(grammar_id, None)

    def end(self, slot: int) -> None:
        self._by_slot.pop(slot, None)

    def step(
        self, slot: int, grammar_id: int, token_ids: Sequence[int], drafts: Sequence[int] = ()
    ) -> int:
        """Go on with a slot's matcher, or begin one; write its next mask, and those that follow its
        drafts. Returns the number of masks. Raises ValueError."""
        if grammar_id:
            kept = self._kept.get(grammar_id)
            if kept is None:
                raise ValueError("the grammar is not kept any more")
            self._by_slot[slot] = _Running(kept.deep_copy())
        running = self._by_slot[slot]
        self._tell(running, token_ids)
        if running.mask is None:
            running.mask = next_mask(running.matcher, self._eos_token_ids)
        self._memory.write(slot, running.mask)
        if not drafts:
            return 1
        return 1 + self._look_ahead(slot, running.matcher, running.mask, drafts)

    def _tell(self, running: _Running, token_ids: Sequence[int]) -> None:
        """Bring a matcher to the end of its output, which has gained these tokens."""
        ahead, running.ahead = running.ahead, []
        pairs = zip(ahead, token_ids, strict=False)
        num_right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        num_wrong, new = len(ahead) - num_right, token_ids[num_right:]
        if num_wrong or new:
            running.mask = None
        if num_wrong and not running.matcher.rollback(num_wrong):  # their step was not read
            raise ValueError(running.matcher.get_error())
        advance(running.matcher, new, self._eos_token_ids)

    def go_ahead(self, slot: int, most: int, end_s: float) -> list[int]:
        """Go on as long as one token alone may follow, by at most `most`, until this thread has
        computed for `end_s`. Returns the tokens; the slot's memory stays as it is.

        Each is read from a mask, so that they are what masks would leave to a sampler. What
        llguidance calls forced tokens need not be: it splits forced text in view of the last token,
        which is another one after each.
        """
        running = self._by_slot[slot]
        with suppress(ValueError):  # the next `step` will say it
            while len(running.ahead) < most and time.thread_time() < end_s:
                token_id = only_token(running.mask or b"", self._memory.vocab_size)
                if token_id is None:
                    break
                running.mask = None
                advance(running.matcher, (token_id,), self._eos_token_ids)
                running.ahead.append(token_id)
                if token_id in self._eos_token_ids:
                    break  # only more of it may follow
                running.mask = next_mask(running.matcher, self._eos_token_ids)
        return list(running.ahead)

    def _look_ahead(
        self, slot: int, matcher: LLMatcher, mask: bytearray, drafts: Sequence[int]
    ) -> int:
        """Write the masks behind drafts up to one that may not follow, or ends the output."""
        count, memory = 0, self._memory
        for token_id in drafts[: memory.num_rows - 1]:
            is_allowed = token_id < memory.vocab_size and mask[token_id // 8] >> token_id % 8 & 1
            if not is_allowed or token_id in self._eos_token_ids:
                break
            advance(matcher, (token_id,), self._eos_token_ids)
            count += 1
            mask = next_mask(matcher, self._eos_token_ids)
            memory.write(slot, mask, count)
        if count and not matcher.rollback(count):
            raise ValueError(matcher.get_error())
        return count


def only_token(mask: bytes | bytearray, vocab_size: int) -> int | None:
    """Return the token of a mask that allows one alone, if the model has it."""
    used = mask.strip(b"\0")
    if len(used) != 1 or used[0] & (used[0] - 1):
        return None
    token_id = 8 * mask.index(used) + used[0].bit_length() - 1
    return token_id if token_id < vocab_size else None
