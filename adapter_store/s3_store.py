"""Objects in an S3 bucket, behind the same interface as files. Knows nothing of adapters.

Large objects travel as parts of a few MiB, several at a time; small ones in a single request.
"""

import hashlib
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from adapter_store.errors import ObjectNotFound, SourceUnavailable, StoreCorrupt
from adapter_store.object_store import OnBytes, check_key
from adapter_store.s3_client import MAX_ATTEMPTS, Answer, S3Client, S3Error

RANGE_BYTES = 8 * 2**20  # of one request; S3 takes an upload in at most 10 000 parts
BUFFER_BYTES = 2**20
NUM_CONNECTIONS = 8  # of one call
CONFLICT_PAUSE_S = 0.05
MAX_CONFLICTS = 20
PROBE_KEY = "probe/put-if-absent"

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]+)-[0-9]+/([0-9]+)")

T = TypeVar("T")


def open_s3(root: str, endpoint_url: str | None = None) -> "S3Store":
    """Open the store at s3://bucket/prefix; without an endpoint, at the one boto3 is set up for."""
    url = urlsplit(root)
    if "@" in url.netloc:  # what is before it may be a secret
        raise SourceUnavailable(
            "an s3:// root must not hold credentials: "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        )
    prefix = url.path.strip("/")
    try:
        if not _BUCKET.fullmatch(url.netloc) or url.query or url.fragment:
            raise ValueError("not a bucket and a prefix")
        check_key(prefix or "none")
    except ValueError as error:
        raise SourceUnavailable(
            f"root {root!r} must be s3://bucket or s3://bucket/prefix: {error}"
        ) from error
    return S3Store(url.netloc, prefix, endpoint_url)


class S3Store:
    """Objects below a prefix of one bucket. Thread-safe.

    A server that breaks the promise of `put_if_absent` would lose records without a word, so it is
    put to the test at the start, and refused if it fails.
    """

    def __init__(self, bucket: str, prefix: str = "", endpoint_url: str | None = None) -> None:
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self._client = S3Client(bucket, endpoint_url)
        self._probe()

    # ---- reading -------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        data = self._read(key, _body)
        assert data is not None, "without a range there is nothing to be past"
        return data

    def get_many(self, keys: Sequence[str]) -> Sequence[bytes]:
        if len(keys) < 2:
            return [self.get(key) for key in keys]
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            return list(pool.map(self.get, keys))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._read(key, _body, Range=f"bytes={start}-{start + length - 1}") or b""

    def get_file(self, key: str, path: Path) -> None:
        path.write_bytes(b"")
        first = self._read_range(key, path, 0)
        if first is None:  # an empty object has no first byte
            return
        nbytes, etag = first

        def read(start: int) -> None:
            self._read_range(key, path, start, etag)

        starts = range(RANGE_BYTES, nbytes, RANGE_BYTES)
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            list(pool.map(read, starts))  # the first failure cancels what has not begun

    def size(self, key: str) -> int | None:
        try:
            return int(self._head(key)["ContentLength"])
        except ObjectNotFound:
            return None

    def list(self, prefix: str, start_after: str = "") -> Sequence[str]:
        request = {"Prefix": self._prefix + prefix}
        if start_after:
            request["StartAfter"] = self._prefix + start_after
        keys: list[str] = []
        while True:
            page = self._client.call("list_objects_v2", f"list {prefix} in", **request)
            keys += [entry["Key"].removeprefix(self._prefix) for entry in page.get("Contents", [])]
            if not page["IsTruncated"]:
                return keys
            request.pop("StartAfter", None)
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _read(self, key: str, take: Callable[[Answer], T], **conditions: str) -> T | None:
        """What `take` makes of a GET; None where the range begins past the object's end.

        boto3 tries again until the body begins, this does if the body breaks off.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                answer = self._get(key, conditions)
            except S3Error as error:
                if error.status == 416:
                    return None
                raise
            try:
                with self._client.errors(f"read {key} in"):
                    return take(answer)
            except S3Error as error:
                if not error.is_broken_off or attempt == MAX_ATTEMPTS:
                    raise
            finally:
                answer["Body"].close()
        raise AssertionError("the last attempt returns or raises")

    def _get(self, key: str, conditions: dict[str, str]) -> Answer:
        full_key = self._full(key)
        try:
            return self._client.call("get_object", f"read {key} in", Key=full_key, **conditions)
        except S3Error as error:
            if error.code == "NoSuchKey":
                raise ObjectNotFound(f"there is no object {key}") from error
            if error.status == 412:
                raise StoreCorrupt(f"{key} changed while it was downloaded") from error
            raise

    def _read_range(
        self, key: str, path: Path, start: int, etag: str | None = None
    ) -> tuple[int, str] | None:
        """Put one range where it belongs in a file; the whole object's size, and its ETag."""

        def write(answer: Answer) -> tuple[int, str]:
            nbytes = self._whole_size(key, answer, start)
            with path.open("r+b") as file:
                file.seek(start)
                while chunk := answer["Body"].read(BUFFER_BYTES):
                    file.write(chunk)
            return nbytes, answer["ETag"]

        conditions = {"Range": f"bytes={start}-{start + RANGE_BYTES - 1}"}
        if etag is not None:
            conditions["IfMatch"] = etag
        return self._read(key, write, **conditions)

    def _whole_size(self, key: str, answer: Answer, start: int) -> int:
        found = _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
        if found and int(found[1]) == start:
            return int(found[2])
        if not found and start == 0 and answer["ContentLength"] <= RANGE_BYTES:
            return int(answer["ContentLength"])  # the whole object is the right answer too
        raise SourceUnavailable(
            f"cannot read {key} in {self._client.where}: it does not answer with the range asked"
        )

    def _head(self, key: str) -> Answer:
        full_key = self._full(key)
        try:
            return self._client.call("head_object", f"look at {key} in", Key=full_key)
        except S3Error as error:
            if error.status == 404:
                raise ObjectNotFound(f"there is no object {key}") from error
            raise

    # ---- writing -------------------------------------------------------------------------------

    def put(self, key: str, data: bytes) -> None:
        self._client.call("put_object", f"write {key} to", Key=self._full(key), Body=data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        writer = uuid.uuid4().hex
        request = {"Key": self._full(key), "Body": data, "Metadata": {"writer": writer}}
        for _ in range(MAX_CONFLICTS):
            try:
                self._client.call("put_object", f"write {key} to", **request, IfNoneMatch="*")
                return True
            except S3Error as error:
                if error.status == 412:
                    return error.was_repeated and self._is_written_by(key, writer)
                if error.status != 409:
                    raise
            time.sleep(CONFLICT_PAUSE_S)  # somebody else is at it: soon we know who won
        raise SourceUnavailable(
            f"cannot write {key} to {self._client.where}: "
            f"{MAX_CONFLICTS} attempts each met another writer"
        )

    def put_file(self, key: str, path: Path, sha256: str, on_bytes: OnBytes) -> None:
        try:
            with path.open("rb") as file:
                if path.stat().st_size > RANGE_BYTES:
                    self._put_parts(key, file, sha256, on_bytes)
                    return
                data = file.read()
        except OSError as error:
            raise SourceUnavailable(f"cannot read {path}: {error}") from error
        _check_content(path, hashlib.sha256(data).hexdigest(), sha256)
        self.put(key, data)
        on_bytes(len(data))

    def _put_parts(self, key: str, file: BinaryIO, sha256: str, on_bytes: OnBytes) -> None:
        """Nothing is visible before the end, so the very bytes that were sent can be checked."""
        target = {"Key": self._full(key)}
        doing = f"write {key} to"
        created = self._client.call("create_multipart_upload", doing, **target)
        target["UploadId"] = created["UploadId"]
        try:
            parts, written = self._send_parts(target, file, on_bytes)
            _check_content(Path(file.name), written, sha256)
            whole = {"Parts": parts}
            self._client.call("complete_multipart_upload", doing, **target, MultipartUpload=whole)
        except BaseException:
            with suppress(S3Error):  # then the parts, invisible, wait for the bucket's own rules
                self._client.call("abort_multipart_upload", doing, **target)
            raise

    def _send_parts(
        self, target: dict[str, str], file: BinaryIO, on_bytes: OnBytes
    ) -> tuple[Sequence[Answer], str]:
        """A few parts at a time; what the server calls them, and the sha256 of them all."""
        digest = hashlib.sha256()
        sending: deque[Future[Answer]] = deque()
        parts: list[Answer] = []
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            while data := file.read(RANGE_BYTES):
                digest.update(data)
                if len(sending) == NUM_CONNECTIONS:
                    parts.append(sending.popleft().result())
                number = len(parts) + len(sending) + 1
                sending.append(pool.submit(self._send_part, target, number, data))
                on_bytes(len(data))
            parts += [part.result() for part in sending]
        return parts, digest.hexdigest()

    def _send_part(self, target: dict[str, str], number: int, data: bytes) -> Answer:
        doing = f"write {target['Key']} to"
        sent = self._client.call("upload_part", doing, **target, PartNumber=number, Body=data)
        return {"PartNumber": number, "ETag": sent["ETag"]}

    def _is_written_by(self, key: str, writer: str) -> bool:
        """Whether an attempt whose answer was lost has written the object after all."""
        return self._head(key)["Metadata"].get("writer") == writer

    def _probe(self) -> None:
        """The key stays, so a later start is one request, which the server must refuse."""
        data = b"Every start tries to write this again, and a store that lets it is refused.\n"
        if self.put_if_absent(PROBE_KEY, data) and self.put_if_absent(PROBE_KEY, data):
            raise SourceUnavailable(
                f"{self._client.where} cannot be used: it ignores If-None-Match, "
                "so one of two writers would be lost without a word"
            )

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)


def _check_content(path: Path, written: str, sha256: str) -> None:
    if written != sha256:
        raise StoreCorrupt(f"{path} changed while it was uploaded: its sha256 is {written}")


def _body(answer: Answer) -> bytes:
    return answer["Body"].read()
