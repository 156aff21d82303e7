"""Matchers: what outputs may continue with, by llguidance. Only its own processes import this."""

import os
import threading
from collections.abc import Sequence

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


class Matchers:
    """The matchers of running requests, one in each slot of `memory` that is in use."""

    def __init__(
        self, table: LLTokenizer, eos_token_ids: Sequence[int], memory: MaskMemory
    ) -> None:
        self._table = table
        self._eos_token_ids = tuple(eos_token_ids)
        self._memory = memory
        self._kept: dict[int, LLMatcher] = {}  # by grammar_id, at their beginnings
        self._by_slot: dict[int, LLMatcher] = {}

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
            self._by_slot[slot] = kept.deep_copy()
        matcher = self._by_slot[slot]
        advance(matcher, token_ids, self._eos_token_ids)
        mask = next_mask(matcher, self._eos_token_ids)
        self._memory.write(slot, mask)
        return 1 + (self._look_ahead(slot, matcher, mask, drafts) if drafts else 0)

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
