"""Choose the kind of object store by the scheme of a root URL."""

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from adapter_store.errors import SourceUnavailable
from adapter_store.file_store import FileStore
from adapter_store.object_store import ObjectStore

ENDPOINT_VARIABLE = "S3_ENDPOINT_URL"


def endpoint_from(environment: Mapping[str, str], root: str) -> str | None:
    """Return the URL in S3_ENDPOINT_URL for a root on S3; None lets boto3 choose."""
    if urlsplit(root).scheme != "s3":
        return None
    return environment.get(ENDPOINT_VARIABLE) or None


def open_store(
    root: str,
    endpoint_url: str | None = None,
    *,
    read_only: bool = False,
    is_impatient: bool = False,
    single_writer: bool = False,
) -> ObjectStore:
    """Open the store at a root such as `file:///srv/adapters` or `s3://bucket/prefix`.

    `endpoint_url` is for S3 alone. `read_only` leaves out the test of conditional writes, which
    writes; so does `single_writer`, with which no other process may write. `is_impatient` gives a
    request up early: for reads that are repeated soon anyway.
    Raises SourceUnavailable.
    """
    url = urlsplit(root)
    if url.scheme == "s3":
        # Imported here because boto3 is slow to import and file stores do not need it.
        from adapter_store.s3_store import open_s3

        return open_s3(
            root,
            endpoint_url,
            read_only=read_only,
            is_impatient=is_impatient,
            single_writer=single_writer,
        )
    if url.scheme != "file":
        raise SourceUnavailable(f"root {root!r} must begin with file:/// or s3://")
    if url.netloc or not url.path.startswith("/"):
        raise SourceUnavailable(f"root {root!r} is not absolute: write file:///absolute/path")
    if endpoint_url is not None:
        raise SourceUnavailable(f"root {root!r} has no endpoint: leave endpoint_url out")
    return FileStore(Path(unquote(url.path)))
