"""MaskMaker: the masks of a step's rows, computed by another process while the step is.

A matcher belongs to one life of a request: it is told the whole output when the life begins (also
of a request that was preempted, or resumed after another replica was lost), and later the tokens
that are new.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from engine.backends.runner import TokenMask
from engine.grammar.cache import GrammarCache
from engine.grammar.channel import ChannelLost
from engine.grammar.limits import MASK_TIMEOUT_S, MAX_FORCED_TOKENS
from engine.grammar.link import GrammarLink
from engine.grammar.mask_memory import MaskMemory
from engine.grammar.messages import MatcherStep, WantMasks
from engine.messages import ErrorKind, RequestError
from engine.scheduler.request import Request

_LOST = RequestError(ErrorKind.ENGINE_DIED, "The process that computes grammars was lost.")

Key = tuple[str, int]
NO_DRAFTS: Mapping[int, list[int]] = {}


@dataclass(slots=True)
class _Matcher:
    slot: int
    life: int
    link: GrammarLink
    num_tokens: int = 0  # of the output, that it has been told


@dataclass(slots=True, eq=False)
class StepMasks:
    """The masks of one step, by index in its batch: [n, words], the one of the next token and those
    behind drafts that may be right. Rows with an error have none."""

    read: "Callable[[StepMasks], Mapping[int, TokenMask]]"
    number: int
    link: GrammarLink | None = None
    slots: dict[int, int] = field(default_factory=dict[int, int])
    errors: dict[int, RequestError] = field(default_factory=dict[int, RequestError])
    forced: dict[int, list[int]] = field(default_factory=dict[int, list[int]])

    def wait(self) -> Mapping[int, TokenMask]:
        """Wait for the masks; afterwards `errors` is complete, and `forced`: for some rows that
        may sample one token alone, that one and those that must follow it."""
        return self.read(self)


class MaskMaker:
    def __init__(self, cache: GrammarCache, memory: MaskMemory) -> None:
        self._cache = cache
        words = np.frombuffer(memory.bytes, np.uint32)
        self._rows = words.reshape(memory.num_slots, memory.num_rows, -1)
        self._matchers: dict[Key, _Matcher] = {}
        self._free_slots = list(range(memory.num_slots))
        self._num_steps = 0

    def begin(
        self,
        rows: Iterable[tuple[int, Request]],
        lives: Mapping[Key, int],
        drafts: Mapping[int, list[int]] = NO_DRAFTS,
    ) -> StepMasks:
        """Ask for the next mask of each row: an index in the batch, and its request.

        `lives` are those of all running requests; no other matcher is needed any more. Some rows
        have `drafts`, by index.
        """
        self._num_steps += 1
        masks = StepMasks(self._read, self._num_steps)
        ended = self._end_others(lives)
        steps: list[MatcherStep] = []
        for index, request in rows:
            entry = self._cache.find(request.sampling.grammar or "")
            link = entry.link
            if link is None or masks.link not in (None, link):
                masks.errors[index] = _LOST
                continue
            masks.link = link
            drafted = drafts.get(index, [])
            steps.append(self._step(request, entry.grammar_id, link, drafted))
            masks.slots[index] = steps[-1][0]
        if masks.link is not None:
            self._send(masks, WantMasks(masks.number, steps, ended))
        return masks

    def _end_others(self, lives: Mapping[Key, int]) -> list[int]:
        over = [key for key, m in self._matchers.items() if lives.get(key) != m.life]
        ended = [self._matchers.pop(key).slot for key in over]
        self._free_slots += ended
        return ended

    def _step(
        self, request: Request, grammar_id: int, link: GrammarLink, drafts: list[int]
    ) -> MatcherStep:
        matcher = self._matchers.get(request.key)
        output = request.output_token_ids
        if matcher is not None and matcher.link is link:
            new_ids, grammar_id = output[matcher.num_tokens :], 0
        else:
            slot = self._free_slots.pop() if matcher is None else matcher.slot
            matcher = self._matchers[request.key] = _Matcher(slot, request.life, link)
            new_ids = list(output)
        matcher.num_tokens = len(output)
        num_left = request.sampling.max_tokens - len(output)
        max_forced = min(num_left, MAX_FORCED_TOKENS) if request.jumps_ahead and not drafts else 0
        return matcher.slot, grammar_id, new_ids, drafts, max_forced

    def _send(self, masks: StepMasks, wanted: WantMasks) -> None:
        assert masks.link is not None
        try:
            masks.link.masks.send(wanted, MASK_TIMEOUT_S)
        except ChannelLost:
            self._lose(masks, masks.link)

    def _read(self, masks: StepMasks) -> Mapping[int, TokenMask]:
        if masks.link is None:
            return {}
        try:
            reply = masks.link.masks.receive(MASK_TIMEOUT_S)
            while reply.number < masks.number:  # of a step that failed before it asked
                reply = masks.link.masks.receive(MASK_TIMEOUT_S)
        except ChannelLost:
            self._lose(masks, masks.link)
            return {}
        for index, slot in masks.slots.items():
            if slot in reply.errors:
                error = f"The grammar cannot be followed any further: {reply.errors[slot]}"
                masks.errors[index] = RequestError(ErrorKind.INVALID_REQUEST, error)
        masks.forced = {i: reply.forced[s] for i, s in masks.slots.items() if s in reply.forced}
        fine = {i: slot for i, slot in masks.slots.items() if i not in masks.errors}
        return {i: self._rows[slot][: reply.num_masks.get(slot, 1)] for i, slot in fine.items()}

    def _lose(self, masks: StepMasks, link: GrammarLink) -> None:
        masks.link = None
        masks.errors |= dict.fromkeys(masks.slots, _LOST)
        self._cache.forget_link(link)
