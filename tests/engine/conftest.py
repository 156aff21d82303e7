"""Provides tiny checkpoints, each written once per session."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.engine.support.tiny import Tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> "Callable[..., Tiny]":
    """Return tiny_model(model_type, **config changes) -> Tiny. Do not change its folder."""
    from tests.engine.support.tiny import write_tiny  # takes seconds to import, so only if needed

    made: dict[str, Tiny] = {}

    def make(model_type: str = "llama", **changes: Any) -> "Tiny":
        key = repr((model_type, sorted(changes.items())))
        if key not in made:
            made[key] = write_tiny(tmp_path_factory.mktemp(model_type), model_type, **changes)
        return made[key]

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if Path("/dev/nvidiactl").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
