"""TextTokens: which tokens of a parsed answer its text is made of, for their log probabilities."""

from collections.abc import Sequence

from deployments.ingress.choice import TokenEntry
from deployments.text.deltas import Delta


class TextTokens:
    """Tokens wait until it is known what they are. Those of tags, reasoning and calls are dropped,
    and so is the white space that is shown nowhere. A token that is text in part counts, unless a
    call begins or ends in it.
    """

    __slots__ = ("_has_logprobs", "_is_in_text", "_texts", "_waiting", "_waiting_text")

    def __init__(self) -> None:
        self._has_logprobs = False
        self._waiting: list[TokenEntry] = []
        self._waiting_text = ""
        self._is_in_text = False  # the last delta was text
        self._texts: list[tuple[int, list[TokenEntry]]] = []  # by length

    def add(self, entry: TokenEntry, text: str) -> None:
        """Add a token and what it brings of the answer's text, before it is parsed."""
        self._has_logprobs = True
        self._waiting.append(entry)
        self._waiting_text += text

    def attribute(self, deltas: Sequence[Delta]) -> None:
        """Give the waiting tokens to the last of these deltas."""
        if not self._has_logprobs:
            return
        for at, delta in enumerate(deltas, 1):
            if isinstance(delta, str):
                tokens = self._tokens_of(delta) if at == len(deltas) else []
                self._texts.append((len(delta), tokens))
            self._is_in_text = isinstance(delta, str)
        self._waiting, self._waiting_text = [], ""

    def _tokens_of(self, text: str) -> list[TokenEntry]:
        """Where a text begins, leave out the tokens before it."""
        if self._is_in_text or text not in self._waiting_text:
            return self._waiting
        before = self._waiting_text.rindex(text)
        start = self._waiting[0].text_offset + before
        ends = [entry.text_offset for entry in self._waiting[1:]]
        ends.append(self._waiting[0].text_offset + len(self._waiting_text))
        pairs = zip(self._waiting, ends, strict=True)
        return [entry for entry, end in pairs if end > start or entry.text_offset >= start]

    def take(self, num_characters: int) -> list[TokenEntry]:
        """Take the tokens of the next texts, which together have so many characters."""
        taken: list[TokenEntry] = []
        while self._texts and num_characters > 0:
            length, entries = self._texts.pop(0)
            num_characters -= length
            taken += entries
        return taken
