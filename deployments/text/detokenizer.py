"""Turn token ids into text, a few at a time, never half a character; and find stop strings.

The texts that `push` and `flush` return add up to the decoding of all ids at once.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that is certain now; what later tokens may change is held back."""
        ...

    def flush(self) -> str:
        """Return the rest. No token may follow."""
        ...


class ByteLevelDetokenizer:
    """For byte-level vocabularies: each token is some bytes, whatever its neighbours."""

    __slots__ = ("_bytes_of", "_decoder")

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1:
            return self._decoder.decode(self._bytes_of(token_ids[0]))
        return self._decoder.decode(b"".join(map(self._bytes_of, token_ids)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other vocabulary: decodes a window of the last tokens again and again.

    The window starts at the last place where text was given out, so that the decoder sees the
    same neighbours (a space belongs to the word after it) as in the whole text. Tokens of single
    bytes are held until their run ends: one bad byte changes how all of the run is decoded. (That
    is why tokenizers' DecodeStream is not used: see findings/decode-stream-byte-runs.sh.)
    """

    __slots__ = ("_decode", "_held", "_is_byte", "_is_visible", "_prefix", "_prefix_text")

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        is_byte: Callable[[int], bool],
        is_visible: Callable[[int], bool],
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._is_byte = is_byte
        self._is_visible = is_visible  # hidden tokens do not even separate their neighbours
        # Tokens whose text has been given out. Half a character is not a safe start.
        self._prefix = list(filter(is_visible, prompt_token_ids))
        self._prefix_text = decode(self._prefix)
        if self._prefix_text.endswith(REPLACEMENT):
            self._prefix, self._prefix_text = [], decode([])
        self._held: list[int] = []  # tokens after them

    def push(self, token_ids: Sequence[int]) -> str:
        self._held.extend(filter(self._is_visible, token_ids))
        if not self._held or self._is_byte(self._held[-1]):
            return ""
        return self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True) if self._held else ""

    def _advance(self, final: bool) -> str:
        text = self._decode(self._prefix + self._held)
        delta = text[len(self._prefix_text) :]
        if not delta or (delta.endswith(REPLACEMENT) and not final):
            return ""
        self._prefix = self._held
        self._prefix_text = self._decode(self._prefix)
        self._held = []
        return delta


class StopStrings:
    """Finds the first place where one of `stops` is complete; holds back what may become one."""

    __slots__ = ("_held", "_longest", "_stops", "hit")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops))
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """Return the text that cannot be part of a stop string. After a hit: the text before it."""
        text = self._held + text
        self._held = ""
        ends = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            _, at, self.hit = min(ends)  # complete first; of those, the longest
            return text[:at]
        keep = self._num_undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _num_undecided(self, text: str) -> int:
        """Measure the longest end of `text` that some stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
