"""Copy whole files to a bucket with boto3's managed transfers.

A large file travels as parts of a few MiB, several at a time. What boto3 leaves out is checked
here: that an upload has the promised content.
"""

# pyright: reportMissingTypeStubs=false

import hashlib
from pathlib import Path
from typing import BinaryIO

from boto3.s3.transfer import TransferConfig

from adapter_store.errors import StoreCorrupt
from adapter_store.object_store import OnBytes
from adapter_store.s3_client import S3Client

PART_BYTES = 8 * 2**20  # S3 takes an upload in at most 10 000 parts
NUM_CONNECTIONS = 8  # per transfer


def upload(
    client: S3Client, key: str, path: Path, sha256: str, on_bytes: OnBytes, doing: str
) -> None:
    """Write or replace an object with a file's content, which must have this sha256.

    The bytes that are hashed are the bytes that are sent, and the object appears only after the
    last of them, so nothing is written if the file has changed. Calls `on_bytes` from another
    thread. `doing` completes "cannot ... bucket". Raises StoreCorrupt for other content, OSError if
    the file cannot be read, S3Error.
    """
    with path.open("rb") as file, client.errors(doing):
        reader = _HashingReader(file, sha256, on_bytes)
        client.boto3_client.upload_fileobj(reader, client.bucket, key, Config=_config())


class _HashingReader:
    """A file that can only be read once, and whose last read fails if the content is wrong.

    It has no `seek`, so boto3 reads it in order, into a bounded number of parts.
    """

    def __init__(self, file: BinaryIO, sha256: str, on_bytes: OnBytes) -> None:
        self._file = file
        self._expected = sha256
        self._on_bytes = on_bytes
        self._digest = hashlib.sha256()

    def read(self, nbytes: int = -1) -> bytes:
        data = self._file.read(nbytes)
        self._digest.update(data)
        if data:
            self._on_bytes(len(data))
        if nbytes < 0 or len(data) < nbytes:
            self._check()
        return data

    def _check(self) -> None:
        found = self._digest.hexdigest()
        if found != self._expected:
            path = self._file.name
            raise StoreCorrupt(f"{path} changed while it was uploaded: its sha256 is {found}")


def _config() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_concurrency=NUM_CONNECTIONS,
        preferred_transfer_client="classic",  # the other one ignores the client's settings
    )
