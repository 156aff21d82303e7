"""Where uploads come from. This version: a folder on local disk."""

from pathlib import Path

from adapter_store.errors import SourceUnavailable


def local_folder(source: str | Path) -> Path:
    """The folder that an upload is in; SourceUnavailable if it is elsewhere or not there."""
    scheme, separator, _ = str(source).partition("://")
    if separator:
        raise SourceUnavailable(
            f"source {source}: {scheme}:// is not supported in this version, use a local folder"
        )
    folder = Path(source)
    if not folder.is_dir():
        raise SourceUnavailable(f"source {source} is not a folder")
    return folder
