"""Provide one base, one real adapter and one S3 server; tests copy what they change."""

import uuid
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import botocore.loaders
import pytest

from adapter_store import store as store_module
from adapter_store.bases import BaseModel, describe_base
from adapter_store.manifest import PreparedAdapter, prepare
from adapter_store.store import AdapterStore
from tests.adapter_store.adapters import write_base, write_peft
from tests.adapter_store.roots import BUCKET, Root, s3_client
from tests.swift.process import ACCESS_KEY, SECRET, Swift, running_swift, why_not

LOADER = (
    botocore.loaders.create_loader()
)  # of boto3's own files, which it would read for each client
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
    """Run all checks of publishing."""
    return lambda folder: prepare(folder, base, lambda _: None)


@pytest.fixture(autouse=True)
def boto3_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the tests' credentials, and hide the settings of the machine."""
    for name in ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("adapter_store.s3_probe.HEAD_START_S", 0.01)  # for every new prefix
    monkeypatch.setattr("adapter_store.s3_probe.OVERLAP_S", 0.05)
    monkeypatch.setattr("botocore.session.create_loader", lambda *_: LOADER)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait longer, so that a busy machine does not look like a store that hangs."""
    monkeypatch.setattr(store_module, "PATIENCE_S", 60.0)


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Generator[Swift, None, None]:
    """Run a real S3 server, with one bucket."""
    folder = tmp_path_factory.mktemp("swift")
    if reason := why_not(folder):
        pytest.skip(reason)
    with running_swift(folder) as server:
        s3_client(server.endpoint_url).create_bucket(Bucket=BUCKET)
        yield server


@pytest.fixture
def file_root(tmp_path: Path) -> Root:
    folder = tmp_path / "root"
    return Root(f"file://{folder}", lambda key: (folder / key).unlink())


@pytest.fixture
def s3_root(swift: Swift, monkeypatch: pytest.MonkeyPatch) -> Root:
    """Use a new prefix on the server, to which boto3's own variable points."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", swift.endpoint_url)
    prefix = uuid.uuid4().hex

    def remove(key: str) -> None:
        s3_client(swift.endpoint_url).delete_object(Bucket=BUCKET, Key=f"{prefix}/{key}")

    return Root(f"s3://{BUCKET}/{prefix}", remove)


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest) -> Root:
    return request.getfixturevalue(f"{request.param}_root")


@pytest.fixture
def new_store(tmp_path: Path, root: Root) -> Callable[..., AdapterStore]:
    """Make stores over one root, each with a disk cache of its own."""
    made: list[AdapterStore] = []

    def make(**options: Any) -> AdapterStore:
        cache = tmp_path / f"cache{len(made)}"
        made.append(AdapterStore(root.url, cache, 2**30, **options))
        return made[-1]

    return make
