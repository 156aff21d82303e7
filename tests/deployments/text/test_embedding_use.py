"""How a model makes vectors: what its folder says, and what the configuration does."""

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.text.embedding_use import EmbeddingUse, find_embedding_use


def write_modules(folder: Path, *kinds: str, **pooling: Any) -> None:
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for module in modules:
        (folder / module["path"]).mkdir()
        (folder / module["path"] / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("kinds", "pooling", "expected"),
    [
        (("Transformer", "Pooling"), {"pooling_mode_mean_tokens": True}, ("mean", False)),
        (
            ("Transformer", "Pooling", "Normalize"),
            {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False},
            ("last", True),
        ),
        (("Transformer", "Pooling"), {"pooling_mode_cls_token": True}, ("cls", False)),
        (("Transformer", "Pooling"), {"pooling_mode": "lasttoken"}, ("last", False)),
    ],
)
def test_a_folder_says_how_it_is_pooled(
    kinds: tuple[str, ...], pooling: dict[str, Any], expected: tuple[str, bool], tmp_path: Path
) -> None:
    write_modules(tmp_path, *kinds, **pooling)
    use = find_embedding_use(tmp_path)
    assert (use.pooling, use.normalize) == expected
    assert find_embedding_use(tmp_path, "cls", True).pooling == "cls"
    assert find_embedding_use(tmp_path, "cls", True).normalize
    assert find_embedding_use(tmp_path, "off").pooling is None


@pytest.mark.parametrize(
    ("kinds", "pooling", "part"),
    [
        (("Transformer", "Pooling", "Dense"), {"pooling_mode_lasttoken": True}, "a module 'Dense'"),
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, "pooling max"),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "pooling mean and cls",
        ),
        (("Transformer",), {}, "no pooling"),
    ],
)
def test_what_a_folder_asks_for_in_vain_is_named(
    kinds: tuple[str, ...], pooling: dict[str, Any], part: str, tmp_path: Path
) -> None:
    write_modules(tmp_path, *kinds, **pooling)
    use = find_embedding_use(tmp_path)
    assert use.pooling is None and part in use.refusal
    assert find_embedding_use(tmp_path, "mean").pooling == "mean"


def test_a_folder_that_says_nothing_serves_no_embeddings(tmp_path: Path) -> None:
    assert find_embedding_use(tmp_path).pooling is None
    assert find_embedding_use(tmp_path, "mean") == EmbeddingUse("mean", True)
