"""Find the folder of an upload on local disk, or bring it there from S3 or Hugging Face's hub."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from adapter_store.errors import AdapterInvalid, SourceUnavailable
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.object_store import JUST_READ, ObjectStore, Reading, StoredObject
from adapter_store.open_store import open_store
from adapter_store.own_files import UPLOADED_FILES
from adapter_store.peft_config import CONFIG_NAME

HUB = "hf://"
_READ = (".safetensors", ".json", ".jinja", ".gguf")  # of what can be converted
_FILES = (CONFIG_NAME, WEIGHTS_NAME, *UPLOADED_FILES)
_MAX_FILES = 1000


class RemoteFolder(Protocol):
    """The files of an upload in another place, whose sizes are known and allowed."""

    @property
    def nbytes(self) -> int:
        """The bytes of all of them."""
        ...

    def fetch(self, folder: Path, how: Reading = JUST_READ) -> None:
        """Copy them into a folder. Raises SourceUnavailable, DownloadStopped, OSError."""
        ...


def local_folder(source: str | Path) -> Path:
    """Return the folder of an upload, or its one file if that is llama.cpp's.

    Raises SourceUnavailable if it is remote or does not exist.
    """
    scheme, separator, _ = str(source).partition("://")
    if separator:
        raise SourceUnavailable(f"source {source}: {scheme}:// is no folder of this machine")
    folder = Path(source)
    if not folder.is_dir() and not (folder.is_file() and folder.suffix == ".gguf"):
        raise SourceUnavailable(f"source {source} is not a folder")
    return folder


def remote_folder(
    url: str, endpoint_url: str | None, max_bytes: int, any_form: bool = False
) -> RemoteFolder:
    """Look at the files of an adapter at s3://bucket/prefix or hf://org/name@revision.

    Nothing is fetched yet. With `any_form`, those of what can be converted are meant too. Raises
    SourceUnavailable, and AdapterInvalid if there is no adapter, or a larger one.
    """
    if url.startswith(HUB):
        # Imported here because only those who use the hub need its package.
        from adapter_store.hub_folder import HubFolder

        found = HubFolder.find(url, os.environ.get("HF_ENDPOINT") or None)
        return found.of([*chosen_files(url, found.sizes, max_bytes, any_form)])
    objects = open_store(url, endpoint_url, read_only=True)
    described = {each.key: each for each in objects.describe_folder("", _MAX_FILES + 1)}
    sizes = {name: each.nbytes for name, each in described.items()}
    chosen = chosen_files(url, sizes, max_bytes, any_form)
    return _ObjectFolder(objects, [described[name] for name in chosen])


def fetch_folder(
    url: str, endpoint_url: str | None, folder: Path, max_bytes: int, any_form: bool = False
) -> None:
    """Copy the files of an adapter into a folder. Raises what `remote_folder` raises."""
    remote_folder(url, endpoint_url, max_bytes, any_form).fetch(folder)


class _ObjectFolder:
    def __init__(self, objects: ObjectStore, files: Sequence[StoredObject]) -> None:
        self._objects = objects
        self._files = files

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self._files)

    def fetch(self, folder: Path, how: Reading = JUST_READ) -> None:
        for file in self._files:
            exactly = Reading(how.on_bytes, how.is_wanted, file.etag)
            self._objects.get_file(file.key, folder / file.key, exactly)


def chosen_files(
    url: str, sizes: Mapping[str, int], max_bytes: int, any_form: bool
) -> Collection[str]:
    """Choose the files of an adapter among those of a folder. Raises AdapterInvalid."""
    if any_form:
        names = [name for name in sizes if name.endswith(_READ)]
        if not names or len(sizes) > _MAX_FILES:
            number = f"{len(names)} files of an adapter"
            raise AdapterInvalid(f"{url} has {number}, not 1 to {_MAX_FILES}")
    else:
        names = [name for name in _FILES if name in sizes]
        missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if name not in sizes]
        if missing:
            raise AdapterInvalid(f"{url} has no {missing[0]}")
    num_bytes = sum(sizes[name] for name in names)
    if num_bytes > max_bytes:
        raise AdapterInvalid(f"{url} has {num_bytes} bytes, more than the {max_bytes} allowed")
    return dict.fromkeys(names)
