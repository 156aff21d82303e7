"""Vocabulary: turn text into token ids and back. No tensors, no torch.

It encodes, decodes, renders chats and makes detokenizers. It reads tokenizer.json,
tokenizer_config.json and chat_template.jinja of the model's folder, and config.json for what
transformers would make of them.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer

from adapter_store.chat_template import (
    read_tokenizer_config,
    special_tokens,
    template_source,
)
from adapter_store.own_tokenizer import KEPT_NAMES, OwnTokenizer
from adapter_store.tokenizer_file import TokenizerRefused, read_tokenizer_file
from deployments.text.ask_transformers import ask_transformers
from deployments.text.auto_tokenizer import describe_difference
from deployments.text.chat_template import ChatTemplate, TemplateRefused
from deployments.text.control_tokens import CUT, END, ControlTokens, without_marks
from deployments.text.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer
from deployments.text.own_vocabulary import on_model_of
from deployments.text.token_bytes import TokenBytes

PREFIX_TOKENS = 6  # more than the bytes of one character

logger = logging.getLogger(__name__)

_NO_IDS: frozenset[int] = frozenset()


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
        self,
        tokenizer: Tokenizer,
        special: Mapping[str, str],
        template: str | ChatTemplate | None,
        token_bytes: TokenBytes | None = None,
    ) -> None:
        """`special` are texts by names that templates know."""
        self._tokenizer = tokenizer
        self._file: Path | None = None
        self._with_model: Tokenizer | None = tokenizer  # which has the file's own model
        # Only clients may cut long prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {i for i, token in added.items() if token.special}
        named = (tokenizer.token_to_id(token) for token in special.values())
        self._special_ids |= {i for i in named if i is not None}
        special_texts = (tokenizer.id_to_token(i) for i in self._special_ids)
        self._control_tokens = ControlTokens(text for text in special_texts if text)
        self.special_tokens = dict(special)
        self._template = ChatTemplate(template, special) if isinstance(template, str) else template
        self._token_bytes = token_bytes or TokenBytes(tokenizer)
        self._hidden: dict[frozenset[int], frozenset[int]] = {}  # by those that are shown

    @classmethod
    def load(
        cls, folder: Path, source: Literal["file", "transformers"] | None = None
    ) -> "Vocabulary":
        """Read a model's folder: as its tokenizer.json says, or as transformers 5 builds it.

        Without a choice as the file says, with a warning where transformers would differ. Raises
        VocabularyMissing, TransformersFailed.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise VocabularyMissing(f"{path} does not exist: only fast tokenizers are supported")
        if source == "transformers":
            tokenizer = Tokenizer.from_str(ask_transformers(folder))
        else:
            tokenizer = Tokenizer.from_file(str(path))
        if source is None:
            _warn_of_difference(folder, tokenizer)
        config = read_tokenizer_config(folder)
        # Not part of tokenizer.json, nor of what transformers writes.
        tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
        found = cls(tokenizer, special_tokens(config), template_source(folder, config))
        found._file = path
        if source == "transformers":
            found._with_model = None
        return found

    def with_own(self, own: OwnTokenizer) -> "Vocabulary":
        """Make the vocabulary of an adapter that brings its own tokenizer, on the same model.

        Compares the models by reading this vocabulary's file once more, in another process; takes
        seconds the first time. Raises TokenizerRefused, OSError.
        """
        if self._file is None or read_tokenizer_file(self._file).model_sha256 != own.model_sha256:
            raise TokenizerRefused("it was made for another tokenizer than its base has now")
        self._with_model = self._with_model or Tokenizer.from_file(str(self._file))
        tokenizer = on_model_of(self._with_model, own)
        special = {n: t for n, t in self.special_tokens.items() if n not in KEPT_NAMES}
        special |= own.special_tokens
        template = self._template
        if template is not None and special != self.special_tokens:
            template = template.source
        token_bytes = TokenBytes(tokenizer, self._token_bytes)
        return Vocabulary(tokenizer, special, template, token_bytes)

    def extends(self, base: "Vocabulary") -> bool:
        """Tell whether all tokens of a base are here what they are there, and shown as there.

        Both have the same model, so that added tokens alone can differ.
        """
        theirs = base._tokenizer.get_added_tokens_decoder()
        if any(self.token(i) != token.content for i, token in theirs.items()):
            return False
        return all(base.is_special(i) for i in self._special_ids if base.token(i))

    @property
    def end_token_id(self) -> int | None:
        """The token that is named eos_token."""
        text = self.special_tokens.get("eos_token")
        return None if text is None else self._tokenizer.token_to_id(text)

    # ---- text to ids ---------------------------------------------------------------------

    @property
    def num_ids(self) -> int:
        """The least number that is above all token ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        inner = self._tokenizer.get_vocab_size(with_added_tokens=False)
        return max(inner, max(added, default=-1) + 1)

    @property
    def longest_token(self) -> int | None:
        """The most bytes of text that one token stands for; None if there is no such bound."""
        return self._token_bytes.longest

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def spans(self, text: str, add_special_tokens: bool) -> list[dict[str, int | str]]:
        """Encode a text: ids, tokens as the vocabulary spells them, and their characters."""
        encoded = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        tokens = zip(encoded.ids, encoded.tokens, encoded.offsets, strict=True)
        return [
            {"id": i, "text": t, "start": start, "stop": stop} for i, t, (start, stop) in tokens
        ]

    def encode_pieces(
        self,
        pieces: Sequence[str],
        add_special_tokens: bool,
        most: int,
        keeps_last: bool = False,
    ) -> list[int]:
        """Encode a text that is cut in pieces, no token across two of them, without the GIL.

        Of a text with more than `most` tokens, `keeps_last` keeps the last ones and the special
        tokens that were added around it, as transformers does. Else it raises TooManyTokens.
        """
        if len(pieces) > most and not keeps_last:
            raise TooManyTokens(len(pieces))  # at least
        is_one = len(pieces) == 1
        encoded = self._tokenizer.encode_batch_fast(
            list(pieces), add_special_tokens=add_special_tokens and is_one
        )
        whole = encoded[0] if is_one else Encoding.merge(encoded, growing_offsets=False)
        if not is_one and add_special_tokens:
            whole = self._tokenizer.post_process(whole, None, True)
        if len(whole) > most and not keeps_last:
            raise TooManyTokens(len(whole))
        return whole.ids if len(whole) <= most else _last_ids(whole, most)

    @property
    def has_template(self) -> bool:
        return self._template is not None

    @property
    def template_source(self) -> str:
        """The chat template; "" if there is none."""
        return "" if self._template is None else self._template.source

    def template_variables(self) -> set[str]:
        """List the variables that the chat template reads."""
        return set() if self._template is None else self._template.variables()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        extra: Mapping[str, Any],
    ) -> str:
        if self._template is None:
            raise TemplateRefused("The model has no chat template: use /v1/completions.")
        return self._template.render(messages, add_generation_prompt, extra)

    def mark_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
        split_special_tokens: bool,
        continue_final_message: bool,
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Mark in a chat what `cut_chat` is to find in the text that is rendered of it."""
        clean: list[dict[str, Any]] = without_marks(list(messages))
        kwargs: dict[str, Any] = without_marks(dict(extra))
        if split_special_tokens:
            clean, kwargs = self._control_tokens.mark(clean), self._control_tokens.mark(kwargs)
        if continue_final_message:
            clean[-1]["content"] += END
        return clean, kwargs

    def cut_chat(self, text: str, continue_final_message: bool) -> list[str]:
        """Cut a rendered chat so that no client's text spells a control token.

        If the final message is to be continued, the text ends with it. Raises TemplateRefused.
        """
        if continue_final_message:
            text, end, _ = text.rpartition(END)
            if not end:
                raise TemplateRefused("The chat template does not show the final message.")
        return text.split(CUT)

    def render_pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        extra: Mapping[str, Any],
        split_special_tokens: bool = False,
        continue_final_message: bool = False,
    ) -> list[str]:
        """Mark a chat, render it with the model's own template, and cut it."""
        marked, kwargs = self.mark_chat(
            messages, extra, split_special_tokens, continue_final_message
        )
        text = self.render(marked, add_generation_prompt, kwargs)
        return self.cut_chat(text, continue_final_message)

    # ---- ids to text ---------------------------------------------------------------------

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(
        self,
        skip_special_tokens: bool,
        prompt_token_ids: Sequence[int] = (),
        shown_ids: frozenset[int] = frozenset(),
    ) -> Detokenizer:
        """Make a detokenizer for what follows the prompt, on which a first space may depend.

        `shown_ids` are special tokens that are not skipped.
        """
        hidden = self._hidden_ids(shown_ids) if skip_special_tokens else _NO_IDS
        if self._token_bytes.are_all_bytes:
            return ByteLevelDetokenizer(self._token_bytes.lookup(hidden))
        return WindowDetokenizer(
            lambda ids: self.decode(ids, False),
            self._token_bytes.is_byte,
            lambda i: i not in hidden and self._tokenizer.id_to_token(i) is not None,
            self._prompt_end(prompt_token_ids),
        )

    def _prompt_end(self, prompt_token_ids: Sequence[int]) -> Sequence[int]:
        """Cut the last tokens off a prompt, not in the middle of a character of byte tokens."""
        start = max(0, len(prompt_token_ids) - PREFIX_TOKENS)
        least = max(0, start - PREFIX_TOKENS)
        while start > least and self._token_bytes.continues_character(prompt_token_ids[start]):
            start -= 1
        return prompt_token_ids[start:]

    def token_bytes(self, token_id: int) -> bytes:
        """Look up what one token stands for by itself."""
        return self._token_bytes.of(token_id)

    def token(self, token_id: int) -> str:
        """Look up a token as the vocabulary spells it; "" for a row that no token uses."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    @property
    def added_texts(self) -> set[str]:
        """The texts of all tokens that were added to the vocabulary."""
        return {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    def added_ids_in(self, texts: Iterable[str]) -> dict[str, int]:
        """Find the tokens that were added to the vocabulary and are part of one of the texts."""
        texts = list(texts)
        added = self._tokenizer.get_added_tokens_decoder()
        return {t.content: i for i, t in added.items() if any(t.content in text for text in texts)}

    def special_ids_in(self, texts: Iterable[str]) -> frozenset[int]:
        """Find the special tokens that are part of one of the texts."""
        texts = list(texts)
        special = ((i, self._tokenizer.id_to_token(i)) for i in self._special_ids)
        return frozenset(i for i, token in special if token and any(token in t for t in texts))

    def _hidden_ids(self, shown_ids: frozenset[int]) -> frozenset[int]:
        if shown_ids not in self._hidden:
            self._hidden[shown_ids] = frozenset(self._special_ids - shown_ids)
        return self._hidden[shown_ids]


def _warn_of_difference(folder: Path, tokenizer: Tokenizer) -> None:
    difference = describe_difference(folder, tokenizer)
    if difference is not None:
        logger.warning(
            "%s. Prompts are encoded as the file says. `models[].tokenizer: transformers` encodes "
            "them as transformers does, for adapters trained with that; `file` ends this warning",
            difference,
        )


def _last_ids(encoding: Encoding, most: int) -> list[int]:
    """Keep the last ids of a text, and those that were added before and behind it."""
    ids, is_added = encoding.ids, encoding.special_tokens_mask
    start, end = 0, len(ids)
    while start < end and is_added[start]:
        start += 1
    while end > start and is_added[end - 1]:
        end -= 1
    num_kept = max(0, most - start - (len(ids) - end))
    return [*ids[:start], *ids[end - num_kept : end], *ids[end:]][-most:]
