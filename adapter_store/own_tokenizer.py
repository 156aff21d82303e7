"""Find how the tokenizer of an adapter's folder differs from its base's, as one small file.

Its model (vocabulary and merges) must be the base's, whose loaded one is then used for both: what
may differ are added tokens, the steps around the model and what tokenizer_config.json says. A
tokenizer that differs in nothing is none.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from adapter_store.chat_template import read_tokenizer_config
from adapter_store.errors import AdapterInvalid, StoreCorrupt
from adapter_store.tokenizer_file import Step, TokenizerFile, TokenizerRefused, read_tokenizer_file
from adapter_store.tokenizer_steps import check_steps, ids_in

TOKENIZER_NAME = "tokenizer.json"
MAX_ADDED_TOKENS = 8192
MAX_ADDED_CHARS = 256
MAX_DOCUMENT_BYTES = 4 * 2**20
_ADDED_FILE, _SPECIAL_FILE = "added_tokens.json", "special_tokens_map.json"
_NO_FAST = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", _ADDED_FILE)
TOKENIZER_FILES = (TOKENIZER_NAME, _SPECIAL_FILE, *_NO_FAST)  # of a folder, which are looked at
_NAMES = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
KEPT_NAMES = ("bos_token", "eos_token")  # templates show one, and answers end with the other
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True)
class OwnTokenizer:
    """A tokenizer on the model of its base, whose hash is `model_sha256`.

    `special_tokens` are texts by name, of KEPT_NAMES.
    """

    model_sha256: str
    added_tokens: Sequence[Mapping[str, Any]]
    steps: Mapping[str, Step | None]
    special_tokens: Mapping[str, str]
    split_special_tokens: bool = False

    @property
    def file(self) -> TokenizerFile:
        return TokenizerFile(self.model_sha256, self.added_tokens, self.steps)

    def to_json(self) -> bytes:
        """Write it; equal ones give equal bytes. The inverse of `parse_own_tokenizer`."""
        return json.dumps(asdict(self), sort_keys=True).encode()


def read_own_tokenizer(
    folder: Path, base: OwnTokenizer | None, refusal: str, num_rows: int
) -> bytes | None:
    """Write what differs from the base's as TOKENIZER_NAME's content; None if nothing does.

    `refusal` says why the base's is not known. `num_rows` are those of the embedding that the
    adapter is served with. Raises AdapterInvalid.
    """
    try:
        tokenizer = read_tokenizer(folder)
        if tokenizer is None or tokenizer == base:
            return None
        if base is None:
            raise TokenizerRefused(f"it cannot be compared with its base's: {refusal}")
        _check(tokenizer, base, num_rows)
    except (OSError, TokenizerRefused) as error:
        raise AdapterInvalid(
            f"the tokenizer of {folder} cannot be served: {error}. Without {TOKENIZER_NAME} in the "
            "folder, the base's is used"
        ) from error
    return tokenizer.to_json()


def parse_own_tokenizer(raw: bytes, digest: str) -> OwnTokenizer:
    """Decode what `OwnTokenizer.to_json` wrote. Raises StoreCorrupt."""
    try:
        return OwnTokenizer(**json.loads(raw))
    except (TypeError, ValueError) as error:
        raise StoreCorrupt(f"the tokenizer of {digest} is damaged: {error!r}") from error


def check_token_ids(token_ids: Iterable[int], num_rows: int) -> None:
    """Raise TokenizerRefused if a token has no row in the embedding."""
    for token_id in token_ids:
        if not 0 <= token_id < num_rows:
            raise TokenizerRefused(
                f"token id {token_id} is outside 0..{num_rows - 1}, the rows of the embedding; an "
                "adapter that was trained with a larger one must bring it"
            )


def _check(tokenizer: OwnTokenizer, base: OwnTokenizer, num_rows: int) -> None:
    if tokenizer.model_sha256 != base.model_sha256:
        raise TokenizerRefused(
            "its model (vocabulary, merges and their options) is not its base's; only added "
            "tokens and the steps around the model may differ"
        )
    added = tokenizer.added_tokens
    check_token_ids((token["id"] for token in added), num_rows)
    check_token_ids(ids_in(tokenizer.steps), num_rows)
    check_steps(tokenizer.file, base.file)
    _check_sizes(tokenizer, base)


def _check_sizes(tokenizer: OwnTokenizer, base: OwnTokenizer) -> None:
    added = tokenizer.added_tokens
    most = max(MAX_ADDED_TOKENS, len(base.added_tokens))
    if len(added) > most:
        raise TokenizerRefused(f"it has {len(added)} added tokens, and at most {most} are taken")
    longest = max(added, key=lambda token: len(token["content"]), default={"content": ""})
    if len(longest["content"]) > MAX_ADDED_CHARS and longest not in base.added_tokens:
        raise TokenizerRefused(
            f"added token {longest['content'][:40]!r}... has {len(longest['content'])} characters, "
            f"and at most {MAX_ADDED_CHARS} are taken"
        )
    num_bytes = len(tokenizer.to_json())
    if num_bytes > MAX_DOCUMENT_BYTES:
        raise TokenizerRefused(
            f"its added tokens and steps have {num_bytes} bytes, and at most "
            f"{MAX_DOCUMENT_BYTES} are taken"
        )


# ---- a folder ------------------------------------------------------------------------------


def read_tokenizer(folder: Path, is_base: bool = False) -> OwnTokenizer | None:
    """Read a folder's tokenizer; None if it has none. Raises TokenizerRefused, OSError.

    Of a base, which is served as its tokenizer.json says, tokens that only other files name do not
    count.
    """
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        others = [name for name in _NO_FAST if (folder / name).is_file()]
        if others:
            raise TokenizerRefused(
                f"it has {others[0]} but no {TOKENIZER_NAME}: save it with transformers' "
                "AutoTokenizer, or remove the file"
            )
        return None
    file = read_tokenizer_file(path)
    try:
        config = read_tokenizer_config(folder)
        special = _special_tokens(folder, config)
        listed = list(_listed_tokens(folder, config))
        listed += [(name, _text(token)) for name in _LISTS for token in _values(config.get(name))]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TokenizerRefused(f"its settings cannot be read: {error!r}") from error
    known = {token["content"] for token in file.added_tokens}
    for name, text in () if is_base else (*special.items(), *listed):
        if text not in known:
            raise TokenizerRefused(f"{name} {text!r} is none of its added tokens")
    return OwnTokenizer(
        file.model_sha256,
        file.added_tokens,
        file.steps,
        {name: special[name] for name in KEPT_NAMES if name in special},
        config.get("split_special_tokens") is True,
    )


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Read special tokens by name. As transformers does, the older file counts for old folders."""
    named = {name: config[name] for name in _NAMES if config.get(name) is not None}
    path = folder / _SPECIAL_FILE
    if "added_tokens_decoder" not in config and path.is_file():
        older = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        named |= {name: older[name] for name in _NAMES if older.get(name) is not None}
    return {name: _text(token) for name, token in named.items()}


def _listed_tokens(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List tokens that other files than tokenizer.json name, each with its file."""
    decoder = cast("dict[str, Any]", config.get("added_tokens_decoder") or {})
    yield from (("added_tokens_decoder", _text(token)) for token in decoder.values())
    path = folder / _ADDED_FILE
    if path.is_file():
        encoder = cast("dict[str, int]", json.loads(path.read_text(encoding="utf-8")))
        yield from ((_ADDED_FILE, text) for text in encoder)


def _values(tokens: Any) -> list[Any]:
    """List tokens that are given by name or as a list."""
    if isinstance(tokens, dict):
        return [*cast("dict[str, Any]", tokens).values()]
    return [*cast("list[Any]", tokens or [])]


def _text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
