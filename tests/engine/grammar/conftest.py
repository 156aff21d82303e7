"""Provides a model with a tokenizer, and one engine of it with its process of grammars."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.engine import Engine
from tests.engine.support.byte_model import write_byte_model
from tests.engine.support.driver import make_engine
from tests.engine.support.tiny import Tiny


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="session")
def byte_folder(byte_model: Tiny) -> Path:
    return byte_model.folder


@pytest.fixture(scope="module")
def engine(byte_folder: Path) -> Iterator[Engine]:
    engine = make_engine(byte_folder, max_model_len=1024)
    yield engine
    engine.close()
