"""One base and one real adapter for all tests; tests copy what they change."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapter_store.bases import BaseModel, describe_base
from adapter_store.manifest import PreparedAdapter, prepare
from adapter_store.store import AdapterStore
from tests.adapter_store.adapters import write_base, write_peft

PEFT_WARNING = "`is_gradient_checkpointing`"  # peft asks transformers by its old name


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return describe_base(base_folder, tmp_path_factory.mktemp("hashes"), lambda _: None)


@pytest.fixture(scope="session")
def peft_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 4, alpha 8, on q_proj and v_proj of both layers. Not to be written to."""
    folder = tmp_path_factory.mktemp("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", PEFT_WARNING, FutureWarning)
        write_peft(folder, base_folder)
    return folder


@pytest.fixture
def check(base: BaseModel) -> Callable[[Path], PreparedAdapter]:
    """All that publishing checks."""
    return lambda folder: prepare(folder, base.fingerprint, base.modules, lambda _: None)


@pytest.fixture
def new_store(tmp_path: Path) -> Callable[..., AdapterStore]:
    """Stores over one root; each has a disk cache of its own."""
    made: list[AdapterStore] = []

    def make(**options: Any) -> AdapterStore:
        cache = tmp_path / f"cache{len(made)}"
        made.append(AdapterStore(f"file://{tmp_path}/root", cache, 2**30, **options))
        return made[-1]

    return make
