"""Find the folder of an upload. This version knows folders on local disk alone."""

from pathlib import Path

from adapter_store.errors import SourceUnavailable


def local_folder(source: str | Path) -> Path:
    """Return the folder of an upload; SourceUnavailable if it is remote or does not exist."""
    scheme, separator, _ = str(source).partition("://")
    if separator:
        raise SourceUnavailable(
            f"source {source}: {scheme}:// is not supported in this version, use a local folder"
        )
    folder = Path(source)
    if not folder.is_dir():
        raise SourceUnavailable(f"source {source} is not a folder")
    return folder
