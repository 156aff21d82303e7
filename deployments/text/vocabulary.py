"""Vocabulary: turn text into token ids and back. No tensors, no torch.

It encodes, decodes, renders chats and makes detokenizers. It reads tokenizer.json,
tokenizer_config.json and chat_template.jinja of the model's folder, and nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import Encoding, Tokenizer

from deployments.text.chat_template import ChatTemplate, TemplateRefused
from deployments.text.control_tokens import CUT, END, ControlTokens, without_marks
from deployments.text.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer

PREFIX_TOKENS = 6  # more than the bytes of one character

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class VocabularyMissing(ValueError):
    """The model folder has no tokenizer that can be read."""


class TooManyTokens(ValueError):
    """The text has more tokens than the caller can use."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"{num_tokens} tokens")
        self.num_tokens = num_tokens


class Vocabulary:
    """Immutable after loading; safe to use from several threads."""

    def __init__(
        self, tokenizer: Tokenizer, special: Mapping[str, str], template: str | None
    ) -> None:
        self._tokenizer = tokenizer
        # Only clients may cut long prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {i for i, token in added.items() if token.special}
        named = (tokenizer.token_to_id(token) for token in special.values())
        self._special_ids |= {i for i in named if i is not None}
        special_texts = (tokenizer.id_to_token(i) for i in self._special_ids)
        self._control_tokens = ControlTokens(text for text in special_texts if text)
        self._template = None if template is None else ChatTemplate(template, special)
        decoders = _decoder_types(json.loads(tokenizer.to_str()).get("decoder"))
        self._is_byte_level = decoders == ["ByteLevel"]
        self._has_byte_tokens = "ByteFallback" in decoders
        self._longest_token = self._measure_longest_token()
        self._bytes: dict[int, bytes] = {}
        self._visible_bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path) -> "Vocabulary":
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise VocabularyMissing(f"{path} does not exist: only fast tokenizers are supported")
        config = _read_json(folder / "tokenizer_config.json")
        special = {n: _token_text(config[n]) for n in _TOKEN_NAMES if config.get(n) is not None}
        return cls(Tokenizer.from_file(str(path)), special, _template_source(folder, config))

    # ---- text to ids ---------------------------------------------------------------------

    @property
    def longest_token(self) -> int | None:
        """The most bytes of text that one token stands for; None if there is no such bound."""
        return self._longest_token

    def _measure_longest_token(self) -> int | None:
        added = self._tokenizer.get_added_tokens_decoder().values()
        own = self._tokenizer.get_vocab(with_added_tokens=False)
        if self._is_byte_level:
            lengths = map(len, own)  # a character for each byte
        elif self._has_byte_tokens:
            lengths = (len(token.encode()) for token in own)
        else:
            return None  # an unknown token may stand for a text of any length
        return max((*lengths, *(len(token.content.encode()) for token in added)), default=None)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_pieces(
        self, pieces: Sequence[str], add_special_tokens: bool, most: int
    ) -> list[int]:
        """Encode a text that is cut in pieces, no token across two of them, without the GIL.

        Raises TooManyTokens.
        """
        if len(pieces) > most:
            raise TooManyTokens(len(pieces))  # at least
        is_one = len(pieces) == 1
        encoded = self._tokenizer.encode_batch_fast(
            list(pieces), add_special_tokens=add_special_tokens and is_one
        )
        whole = encoded[0] if is_one else Encoding.merge(encoded, growing_offsets=False)
        if not is_one and add_special_tokens:
            whole = self._tokenizer.post_process(whole, None, True)
        if len(whole) > most:
            raise TooManyTokens(len(whole))
        return whole.ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        extra: Mapping[str, Any],
    ) -> str:
        if self._template is None:
            raise TemplateRefused("The model has no chat template: use /v1/completions.")
        return self._template.render(messages, add_generation_prompt, extra)

    def render_pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        extra: Mapping[str, Any],
        split_special_tokens: bool = False,
        continue_final_message: bool = False,
    ) -> list[str]:
        """Render a chat as a text, cut so that no client's text spells a control token.

        If the final message is to be continued, the text ends with it.
        """
        clean: list[dict[str, Any]] = without_marks(list(messages))
        extra = without_marks(dict(extra))
        if split_special_tokens:
            clean, extra = self._control_tokens.mark(clean), self._control_tokens.mark(extra)
        if continue_final_message:
            clean[-1]["content"] += END
        text = self.render(clean, add_generation_prompt, extra)
        if continue_final_message:
            text, end, _ = text.rpartition(END)
            if not end:
                raise TemplateRefused("The chat template does not show the final message.")
        return text.split(CUT)

    # ---- ids to text ---------------------------------------------------------------------

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(
        self, skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()
    ) -> Detokenizer:
        """Make a detokenizer for what follows the prompt, on which a first space may depend."""
        if self._is_byte_level:
            table = self._visible_bytes if skip_special_tokens else self._bytes
            return ByteLevelDetokenizer(_Lookup(self, table, skip_special_tokens))
        hidden = self._special_ids if skip_special_tokens else set[int]()
        return WindowDetokenizer(
            lambda ids: self.decode(ids, False),
            self._is_byte,
            lambda i: i not in hidden and self._tokenizer.id_to_token(i) is not None,
            self._prompt_end(prompt_token_ids),
        )

    def _prompt_end(self, prompt_token_ids: Sequence[int]) -> Sequence[int]:
        """Cut the last tokens off a prompt, not in the middle of a character of byte tokens."""
        start = max(0, len(prompt_token_ids) - PREFIX_TOKENS)
        least = max(0, start - PREFIX_TOKENS)
        while start > least and self._continues_character(prompt_token_ids[start]):
            start -= 1
        return prompt_token_ids[start:]

    def _continues_character(self, token_id: int) -> bool:
        return self._is_byte(token_id) and self.token_bytes(token_id)[0] & 0xC0 == 0x80

    def token_bytes(self, token_id: int) -> bytes:
        """Look up what one token stands for by itself."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""  # a row of the embedding that no token uses
        if self._is_byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:  # an added token is its own text
                return token.encode()
        if self._is_byte(token_id):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def _is_byte(self, token_id: int) -> bool:
        if not self._has_byte_tokens:
            return False
        token = self._tokenizer.id_to_token(token_id)
        return token is not None and len(token) == 6 and token.startswith("<0x")


class _Lookup:
    """Maps token ids to bytes, kept per vocabulary: one dictionary look-up per token."""

    __slots__ = ("_skip_special_tokens", "_table", "_vocabulary")

    def __init__(
        self, vocabulary: Vocabulary, table: dict[int, bytes], skip_special_tokens: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._table = table
        self._skip_special_tokens = skip_special_tokens

    def __call__(self, token_id: int) -> bytes:
        found = self._table.get(token_id)
        if found is None:
            hidden = self._skip_special_tokens and self._vocabulary.is_special(token_id)
            found = b"" if hidden else self._vocabulary.token_bytes(token_id)
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


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _token_text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Find the chat template: the file's, else the config's, the one named default of several."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):
        named = cast(list[dict[str, str]], template)
        return next((t["template"] for t in named if t["name"] == "default"), None)
    return template
