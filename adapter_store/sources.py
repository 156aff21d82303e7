"""Find the folder of an upload, on local disk, or bring it there from S3."""

from pathlib import Path

from adapter_store.errors import AdapterInvalid, SourceUnavailable
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.object_store import ObjectStore
from adapter_store.open_store import open_store
from adapter_store.own_files import UPLOADED_FILES
from adapter_store.peft_config import CONFIG_NAME

_READ = (".safetensors", ".json", ".jinja", ".gguf")  # of what can be converted
_MAX_FILES = 1000


def local_folder(source: str | Path) -> Path:
    """Return the folder of an upload, or its one file if that is llama.cpp's.

    Raises SourceUnavailable if it is remote or does not exist.
    """
    scheme, separator, _ = str(source).partition("://")
    if separator:
        raise SourceUnavailable(
            f"source {source}: {scheme}:// is not supported in this version, use a local folder"
        )
    folder = Path(source)
    if not folder.is_dir() and not (folder.is_file() and folder.suffix == ".gguf"):
        raise SourceUnavailable(f"source {source} is not a folder")
    return folder


def fetch_folder(
    url: str, endpoint_url: str | None, folder: Path, max_bytes: int, any_form: bool = False
) -> None:
    """Copy the files of an adapter from s3://bucket/prefix into a folder.

    With `any_form`, those of what can be converted too. Raises SourceUnavailable, and
    AdapterInvalid if there is no adapter, or a larger one.
    """
    objects = open_store(url, endpoint_url, read_only=True)
    if any_form:
        names = _files_of_any_form(url, objects)
    else:
        names = [CONFIG_NAME, WEIGHTS_NAME, *UPLOADED_FILES]
    sizes = {name: objects.size(name) for name in names}
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if sizes.get(name) is None]
    if missing and not any_form:
        raise AdapterInvalid(f"{url} has no {missing[0]}")
    num_bytes = sum(size or 0 for size in sizes.values())
    if num_bytes > max_bytes:
        raise AdapterInvalid(f"{url} has {num_bytes} bytes, more than the {max_bytes} allowed")
    for name, size in sizes.items():
        if size is not None:
            objects.get_file(name, folder / name)


def _files_of_any_form(url: str, objects: ObjectStore) -> list[str]:
    found = [name for name in objects.list("") if "/" not in name]
    names = [name for name in found if name.endswith(_READ)]
    if not names or len(names) > _MAX_FILES:
        raise AdapterInvalid(f"{url} has {len(names)} files of an adapter, not 1 to {_MAX_FILES}")
    return names
