"""EmbeddingUse: how a model makes vectors of texts, as its folder or the configuration says.

Folders that sentence-transformers has written list in modules.json what follows the model itself.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

AUTO, OFF = "auto", "off"
HOW_TO = "set models[].embeddings.pooling in the configuration to mean, last or cls"
_PREFIX = "pooling_mode_"  # of a flag for each kind
_NAMES = {"mean": "mean", "lasttoken": "last", "cls": "cls", "cls_token": "cls"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EmbeddingUse:
    """`pooling` is one of the engine's, or None: then `refusal` says why there are no vectors."""

    pooling: str | None = None
    normalize: bool = True
    refusal: str = HOW_TO


NO_EMBEDDINGS = EmbeddingUse()


class _NotServed(ValueError):
    """The folder asks for what is not computed."""


def find_embedding_use(
    folder: Path, pooling: str = AUTO, normalize: bool | None = None
) -> EmbeddingUse:
    """Settle the configured values, with those of the folder where they are left open."""
    if pooling == OFF:
        return NO_EMBEDDINGS
    try:
        use = _read_modules(folder)
    except (_NotServed, ValueError, OSError) as error:
        logger.warning("%s: modules.json asks for what is not computed: %s", folder, error)
        use = EmbeddingUse(
            refusal=f"its modules.json asks for what is not computed ({error}); {HOW_TO}"
        )
    if pooling != AUTO:
        use = replace(use, pooling=pooling)
    return use if normalize is None else replace(use, normalize=normalize)


def _read_modules(folder: Path) -> EmbeddingUse:
    """Read what follows the model. Raises ValueError, OSError."""
    path = folder / "modules.json"
    if not path.is_file():
        return NO_EMBEDDINGS
    modules = _objects(json.loads(path.read_text()))
    pooling, normalize = None, False
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling_of(folder / str(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise _NotServed(f"a module {kind or module!r}")
    if pooling is None:
        raise _NotServed("no pooling")
    return EmbeddingUse(pooling, normalize)


def _objects(document: object) -> Sequence[Mapping[str, Any]]:
    items = cast(list[object], document) if isinstance(document, list) else [None]
    if not all(isinstance(item, dict) for item in items):
        raise _NotServed("it is no list of objects")
    return cast(list[Mapping[str, Any]], items)


def _pooling_of(path: Path) -> str:
    [config] = _objects([json.loads(path.read_text())])
    flags = [name for name in config if name.startswith(_PREFIX) and config[name] is True]
    asked = [name.removeprefix(_PREFIX).removesuffix("_tokens") for name in flags]
    if isinstance(config.get("pooling_mode"), str):
        asked = [config["pooling_mode"]]
    if len(asked) != 1 or asked[0] not in _NAMES:
        raise _NotServed(f"pooling {' and '.join(asked) or 'of no kind'}")
    return _NAMES[asked[0]]
