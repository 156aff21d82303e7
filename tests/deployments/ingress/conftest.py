"""Provide what tests of the admin API upload, and where to."""

from pathlib import Path

import pytest

from tests.deployments.support.admin import Place, made_place


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_place(tmp_path_factory.mktemp("made"))


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    return Place(made, tmp_path)
