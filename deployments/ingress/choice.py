"""Choice: one answer as it grows, from token ids to the text that may be shown.

Counts what is billed, ends at stop strings and keeps every token. Knows nothing of JSON or HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.text.detokenizer import Detokenizer, StopStrings
from engine.messages import RequestOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token's logprobs and where its text begins in the answer. None: a first prompt token."""

    token_id: int
    logprobs: TokenLogprobs | None
    text_offset: int


class Choice:
    """After `finish_reason` is set, what is pushed is ignored.

    `unsent_entries` gather until a chunk takes them, and `num_sent_tokens` says how many token
    ids chunks have taken: text that is held back keeps its tokens with it.
    """

    __slots__ = (
        "_detokenizer",
        "_include_stop",
        "_min_tokens",
        "_stops",
        "_sum_logprobs",
        "_text_length",
        "finish_reason",
        "index",
        "num_sent_tokens",
        "opening",
        "prompt_logprobs",
        "stop_reason",
        "token_ids",
        "unsent_entries",
    )

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        opening: str = "",
    ) -> None:
        self.index = index
        self.opening = opening  # shown before everything: an echoed prompt
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.token_ids: list[int] = []
        self.unsent_entries: list[TokenEntry] = []
        self.num_sent_tokens = 0
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops) if stops else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._text_length = len(opening)
        self._sum_logprobs = 0.0
        self.prompt_logprobs: Sequence[TokenLogprobs | None] | None = None

    @property
    def mean_logprob(self) -> float:
        """The mean over all tokens, which must have come with theirs."""
        return self._sum_logprobs / max(1, len(self.token_ids))

    def take_text_entries(self, num_characters: int) -> list[TokenEntry]:
        """Take the tokens of so many characters of text that are shown next, without the end's."""
        entries = self.unsent_entries[:]
        self.unsent_entries.clear()
        while self.finish_reason and entries and entries[-1].text_offset >= self._text_length:
            entries.pop()
        return entries

    def push(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None
    ) -> str:
        """Add tokens. Returns the new text that may be shown."""
        if self.finish_reason is not None:
            return ""
        if self._stops is None and logprobs is None:
            self.token_ids.extend(token_ids)
            return self._grow(self._detokenizer.push(token_ids))
        shown = ""
        for at, token_id in enumerate(token_ids):
            if self.finish_reason is not None:
                break  # the rest comes after a stop string and is not billed
            shown += self._push_one(token_id, None if logprobs is None else logprobs[at])
        return shown

    def finish(self, output: RequestOutput) -> str:
        """Add the last output. Returns its text and all that was still held back."""
        shown = list(output.token_ids)
        hidden = [shown.pop()] if output.stop_token_id is not None and shown else []
        logprobs = output.logprobs
        text = self.push(shown, None if logprobs is None else logprobs[: len(shown)])
        if self.finish_reason is not None:
            return text
        for token_id in hidden:  # billed, listed, but not shown
            self._record(token_id, None if logprobs is None else logprobs[-1])
        return text + self._end(output)

    def _end(self, output: RequestOutput) -> str:
        """Take what was held back, and why the answer ends."""
        text = self._filter(self._grow(self._detokenizer.flush()))
        if self.finish_reason is None:
            text += "" if self._stops is None else self._stops.flush()
            self.finish_reason = output.finish_reason
            self.stop_reason = output.stop_token_id
        return text

    def _push_one(self, token_id: int, logprobs: TokenLogprobs | None) -> str:
        self._record(token_id, logprobs)
        return self._filter(self._grow(self._detokenizer.push((token_id,))))

    def _record(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        self.token_ids.append(token_id)
        if logprobs is not None:
            self._sum_logprobs += logprobs.logprob
            self.unsent_entries.append(TokenEntry(token_id, logprobs, self._text_length))

    def _grow(self, text: str) -> str:
        self._text_length += len(text)
        return text

    def _filter(self, text: str) -> str:
        stops = self._stops
        if stops is None or len(self.token_ids) < self._min_tokens:
            return text
        text = stops.push(text)
        if stops.hit is None:
            return text
        self.finish_reason = "stop"
        self.stop_reason = stops.hit
        return text + stops.hit if self._include_stop else text
