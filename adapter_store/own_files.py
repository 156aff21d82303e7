"""OwnFiles: what an adapter brings beside its weights, each in a small file of its own.

The files are part of its digest. What is not there is the base's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapter_store.base_text import BaseText
from adapter_store.chat_template import (
    TEMPLATE_FILES,
    TEMPLATE_NAME,
    AdapterTemplate,
    parse_adapter_template,
    read_adapter_template,
)
from adapter_store.generation_settings import (
    GENERATION_NAME,
    GenerationSettings,
    parse_generation,
    read_generation,
)
from adapter_store.own_tokenizer import (
    MAX_DOCUMENT_BYTES,
    TOKENIZER_FILES,
    TOKENIZER_NAME,
    OwnTokenizer,
    parse_own_tokenizer,
    read_own_tokenizer,
)

OWN_NAMES = (TEMPLATE_NAME, TOKENIZER_NAME, GENERATION_NAME)
UPLOADED_FILES = (*TEMPLATE_FILES, *TOKENIZER_FILES, GENERATION_NAME)  # of a folder
MAX_OWN_BYTES = MAX_DOCUMENT_BYTES  # of each


@dataclass(frozen=True, slots=True)
class OwnFiles:
    template: AdapterTemplate | None = None
    tokenizer: OwnTokenizer | None = None
    generation: GenerationSettings | None = None


NO_OWN_FILES = OwnFiles()


def read_own_files(folder: Path, base: BaseText, num_rows: int = 0) -> dict[str, bytes]:
    """Write what a folder brings, by the names of OWN_NAMES; equal folders give equal bytes.

    `num_rows` are those of the embedding that the adapter brings; 0: it is the base's.
    Raises AdapterInvalid.
    """
    rows = num_rows or base.vocab_size
    found = {
        TEMPLATE_NAME: _own_template(folder, base.template),
        TOKENIZER_NAME: read_own_tokenizer(folder, base.tokenizer, base.refusal, rows),
        GENERATION_NAME: read_generation(folder, rows or None),
    }
    return {name: content for name, content in found.items() if content is not None}


def _own_template(folder: Path, base: AdapterTemplate | None) -> bytes | None:
    """Leave out a template that is the base's. Special tokens count if it names them."""
    raw = read_adapter_template(folder)
    if raw is None or base is None:
        return raw
    own = parse_adapter_template(raw, str(folder))
    if own.source != base.source:
        return raw
    named = [name for name in {*own.special_tokens, *base.special_tokens} if name in own.source]
    differ = any(own.special_tokens.get(n) != base.special_tokens.get(n) for n in named)
    return raw if differ else None


def parse_own_files(files: Mapping[str, bytes], digest: str) -> OwnFiles:
    """Decode what `read_own_files` wrote. Raises StoreCorrupt."""
    template, tokenizer = files.get(TEMPLATE_NAME), files.get(TOKENIZER_NAME)
    generation = files.get(GENERATION_NAME)
    return OwnFiles(
        None if template is None else parse_adapter_template(template, digest),
        None if tokenizer is None else parse_own_tokenizer(tokenizer, digest),
        None if generation is None else parse_generation(generation, digest),
    )
