"""Copy whole files to and from a bucket with boto3's managed transfers.

A large file travels as parts of a few MiB, several at a time. Two checks that boto3 leaves out are
made here: that an upload has the promised content, and that a server honours ranges.
"""

# pyright: reportMissingTypeStubs=false

import hashlib
import math
import re
from pathlib import Path
from typing import Any, BinaryIO

from boto3.s3.transfer import S3Transfer, TransferConfig

from adapter_store.errors import StoreCorrupt
from adapter_store.object_store import OnBytes
from adapter_store.s3_client import MAX_ATTEMPTS, Answer, S3Client

PART_BYTES = 8 * 2**20  # S3 takes an upload in at most 10 000 parts
NUM_CONNECTIONS = 8  # per transfer

_RANGE = re.compile(r"bytes=([0-9]+)-([0-9]*)")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]+)-([0-9]+)/[0-9]+")


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


def download(client: S3Client, key: str, path: Path, doing: str) -> None:
    """Write an object to a file, which appears or is replaced when it is complete.

    `doing` completes "cannot ... bucket". Raises OSError if the file cannot be written, S3Error of
    status 416 for an empty object, which has no range to ask for, and of status 412 if the object
    changes meanwhile.
    """
    transfer: Any = S3Transfer(_RangeCheckingClient(client, doing), _config())
    with client.errors(doing), transfer:
        transfer.download_file(client.bucket, key, str(path))


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


class _RangeCheckingClient:
    """boto3's client, as much of it as a download uses.

    boto3 writes whatever a server sends in answer to a range, waits forever after some answers, and
    repeats a request that its own retries have given up. Here each is an S3Error, which ends the
    download.
    """

    def __init__(self, client: S3Client, doing: str) -> None:
        self.meta: Any = client.boto3_client.meta
        self._client = client
        self._doing = doing

    def get_object(self, **request: Any) -> Answer:
        with self._client.errors(self._doing):
            answer: Answer = self._client.boto3_client.get_object(**request)
        if not _is_range(request["Range"], answer):
            answer["Body"].close()
            raise self._client.error(self._doing, "it does not answer with the range asked")
        return answer


def _is_range(asked: str, answer: Answer) -> bool:
    """Check that an answer starts and ends where it should, or is an object that fits."""
    match = _RANGE.fullmatch(asked)
    assert match is not None, asked
    start, last = int(match[1]), match[2]
    if "ContentRange" not in answer:
        nbytes = answer.get("ContentLength", math.inf)
        return start == 0 and last != "" and nbytes <= int(last) + 1
    found = _CONTENT_RANGE.fullmatch(answer["ContentRange"])
    return found is not None and int(found[1]) == start and int(found[2]) <= int(last or found[2])


def _config() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_concurrency=NUM_CONNECTIONS,
        num_download_attempts=MAX_ATTEMPTS,
        preferred_transfer_client="classic",  # the other one ignores the client's settings
    )
