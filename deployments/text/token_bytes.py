"""TokenBytes: what single tokens of a vocabulary stand for, in bytes."""

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from tokenizers import Tokenizer


class TokenBytes:
    """Vocabularies are of bytes (a character stands for each), of texts, or of texts and bytes.

    `longest` is the most bytes that a token stands for; None if there is no such bound. With a
    `base`, whose tokenizer has the same model, that is not measured again if it is read alike.
    """

    def __init__(self, tokenizer: Tokenizer, base: "TokenBytes | None" = None) -> None:
        self._tokenizer = tokenizer
        decoder: Any = cast(Any, tokenizer).decoder  # its own types are incomplete
        decoders = _decoder_types(None if decoder is None else json.loads(decoder.__getstate__()))
        self.are_all_bytes = decoders == ["ByteLevel"]
        self._has_byte_tokens = "ByteFallback" in decoders
        is_alike = base is not None and base.kind == self.kind
        self._longest_own = base._longest_own if base and is_alike else self._measure_own()
        self.longest = self._measure_longest()
        self._tables: dict[frozenset[int], dict[int, bytes]] = {}  # by those that are hidden

    @property
    def kind(self) -> tuple[bool, bool]:
        return self.are_all_bytes, self._has_byte_tokens

    def of(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""  # a row of the embedding that no token uses
        if self.are_all_bytes:
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:  # an added token is its own text
                return token.encode()
        if self.is_byte(token_id):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def is_byte(self, token_id: int) -> bool:
        """Tell whether a token is a single byte among texts."""
        if not self._has_byte_tokens:
            return False
        token = self._tokenizer.id_to_token(token_id)
        return token is not None and len(token) == 6 and token.startswith("<0x")

    def continues_character(self, token_id: int) -> bool:
        return self.is_byte(token_id) and self.of(token_id)[0] & 0xC0 == 0x80

    def lookup(self, hidden: frozenset[int]) -> Callable[[int], bytes]:
        """Make a look-up of tokens, of which some stand for nothing."""
        return _Lookup(self, self._tables.setdefault(hidden, {}), hidden)

    def _measure_own(self) -> int | None:
        """Measure the tokens of the model, all in one pass."""
        own = self._tokenizer.get_vocab(with_added_tokens=False)
        if self.are_all_bytes:
            return max(map(len, own), default=None)  # a character for each byte
        if self._has_byte_tokens:
            return max((len(token.encode()) for token in own), default=None)
        return None  # an unknown token may stand for a text of any length

    def _measure_longest(self) -> int | None:
        if not self.are_all_bytes and not self._has_byte_tokens:
            return None
        added = self._tokenizer.get_added_tokens_decoder().values()
        lengths = [len(token.content.encode()) for token in added]
        own = self._longest_own
        return max((*lengths, *([] if own is None else [own])), default=None)


class _Lookup:
    """Maps token ids to bytes, kept per vocabulary: one dictionary look-up per token."""

    __slots__ = ("_bytes", "_hidden", "_table")

    def __init__(
        self, token_bytes: TokenBytes, table: dict[int, bytes], hidden: frozenset[int]
    ) -> None:
        self._bytes = token_bytes
        self._table = table
        self._hidden = hidden

    def __call__(self, token_id: int) -> bytes:
        found = self._table.get(token_id)
        if found is None:
            found = b"" if token_id in self._hidden else self._bytes.of(token_id)
            self._table[token_id] = found
        return found


def _byte_alphabet() -> dict[str, int]:
    """List the characters that stand for the 256 bytes in byte-level vocabularies.

    Printable bytes stand for themselves; the others, in order, for the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _decoder_types(decoder: Mapping[str, Any] | None) -> list[str]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [name for part in decoder["decoders"] for name in _decoder_types(part)]
    return [decoder["type"]]
