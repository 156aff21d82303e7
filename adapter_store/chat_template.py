"""Find the chat template in a folder, and keep that of an adapter as one small file.

The file holds the source and the special tokens that templates name. Nothing here compiles or runs
a template.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from adapter_store.errors import AdapterInvalid, StoreCorrupt

TEMPLATE_NAME = "chat_template.json"
MAX_TEMPLATE_CHARS = 64 * 2**10
MAX_TOKEN_CHARS = 1024
MAX_FILE_BYTES = 2**20  # more than those characters take, however they are written
_SOURCE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILES = (_SOURCE_FILE, _CONFIG_FILE)  # of a folder, which are read
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


@dataclass(frozen=True, slots=True)
class AdapterTemplate:
    """An adapter's own chat template; `special_tokens` are texts by names such as bos_token."""

    source: str
    special_tokens: Mapping[str, str]


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json; empty if there is none. Raises OSError, ValueError."""
    path = folder / _CONFIG_FILE
    config: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    return cast("dict[str, Any]", config)


def template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Find the chat template: the file's, else the config's, the one named default of several."""
    path = folder / _SOURCE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = cast("list[dict[str, str]]", template)
        return next((t["template"] for t in named if t["name"] == "default"), None)
    return template


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Read the special tokens that tokenizer_config.json names."""
    named = {name: config.get(name) for name in _TOKEN_NAMES}
    return {name: _token_text(token) for name, token in named.items() if token is not None}


def _token_text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def read_adapter_template(folder: Path) -> bytes | None:
    """Write the folder's chat template as TEMPLATE_NAME's content; None if it has none.

    Equal templates give equal bytes. Raises AdapterInvalid.
    """
    try:
        config = read_tokenizer_config(folder)
        source, tokens = template_source(folder, config), special_tokens(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterInvalid(f"the chat template of {folder} cannot be read: {error!r}") from error
    if source is None:
        return None
    if not isinstance(source, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterInvalid(f"chat_template of {folder / _CONFIG_FILE} is not a text")
    if len(source) > MAX_TEMPLATE_CHARS:
        raise AdapterInvalid(
            f"the chat template of {folder} has {len(source)} characters, and at most "
            f"{MAX_TEMPLATE_CHARS} are taken"
        )
    for name, token in tokens.items():
        if len(token) > MAX_TOKEN_CHARS:
            raise AdapterInvalid(
                f"{name} of {folder / _CONFIG_FILE} has {len(token)} characters, and at most "
                f"{MAX_TOKEN_CHARS} are taken"
            )
    return json.dumps({"source": source, "special_tokens": tokens}, sort_keys=True).encode()


def parse_adapter_template(raw: bytes, digest: str) -> AdapterTemplate:
    """Decode what `read_adapter_template` wrote. Raises StoreCorrupt."""
    try:
        data: dict[str, Any] = json.loads(raw)
        tokens = {str(name): str(token) for name, token in data["special_tokens"].items()}
        return AdapterTemplate(str(data["source"]), tokens)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreCorrupt(f"the chat template of {digest} is damaged: {error!r}") from error
