"""BaseText: the text side of a base, with which the files of its adapters are compared."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapter_store.chat_template import (
    AdapterTemplate,
    parse_adapter_template,
    read_adapter_template,
)
from adapter_store.errors import AdapterInvalid
from adapter_store.own_tokenizer import OwnTokenizer, read_tokenizer
from adapter_store.tokenizer_file import TokenizerRefused


@dataclass(frozen=True, slots=True)
class BaseText:
    """Without a tokenizer, `refusal` says why adapters can have none either."""

    vocab_size: int = 0  # rows of the embedding; 0 if they are not known
    tokenizer: OwnTokenizer | None = None
    template: AdapterTemplate | None = None
    refusal: str = "the base was registered without its tokenizer: register it again"

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON values; the inverse of `base_text_of`."""
        return asdict(self)


NO_TEXT = BaseText()


def base_text_of(data: Mapping[str, Any]) -> BaseText:
    """Restore what `to_data` returned. Raises TypeError for other data."""
    tokenizer, template = data.get("tokenizer"), data.get("template")
    found: dict[str, Any] = {
        "tokenizer": None if tokenizer is None else OwnTokenizer(**tokenizer),
        "template": None if template is None else AdapterTemplate(**template),
    }
    return BaseText(**{**data, **found})


def describe_text(model_folder: Path, vocab_size: int) -> BaseText:
    """Read a base's folder. What cannot be read there is no error: no adapter may need it."""
    template, tokenizer, refusal = None, None, ""
    try:
        tokenizer = read_tokenizer(model_folder, is_base=True)
        if tokenizer is None:
            refusal = "the base has no tokenizer.json"
    except (OSError, TokenizerRefused) as error:
        refusal = f"the base's own cannot be read: {error}"
    try:
        raw = read_adapter_template(model_folder)
        template = None if raw is None else parse_adapter_template(raw, "the base")
    except AdapterInvalid:  # a longer one than adapters may have
        pass
    return BaseText(vocab_size, tokenizer, template, refusal)
