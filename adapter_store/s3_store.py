"""Keep objects in an S3 bucket, behind the same interface as files. Knows nothing of adapters."""

import logging
import re
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from adapter_store.errors import AccessDenied, ObjectChanged, ObjectNotFound, SourceUnavailable
from adapter_store.object_store import JUST_READ, OnBytes, Reading, StoredObject, check_key
from adapter_store.s3_client import MAX_ATTEMPTS, Answer, S3Client, S3Error
from adapter_store.s3_download import download
from adapter_store.s3_probe import do_both_succeed
from adapter_store.s3_transfers import NUM_CONNECTIONS, upload

CONFLICT_PAUSE_S = 0.05
MAX_CONFLICTS = 20
MAX_KEYS = 1000  # that S3 puts on a page of a listing
PROBE_KEY = "probe/put-if-absent"

OVERLAP_KEY = "probe/overlap"

_ALONE = (
    "if only one process at a time will write, run with adapters.single_writer: true and publish "
    "with --single-writer"
)
_log = logging.getLogger(__name__)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")


def open_s3(
    root: str,
    endpoint_url: str | None = None,
    *,
    read_only: bool = False,
    is_impatient: bool = False,
    single_writer: bool = False,
) -> "S3Store":
    """Open the store at s3://bucket/prefix; without an endpoint, boto3 chooses one.

    `single_writer` is the caller's word that no other process writes meanwhile: then a server is
    taken that does not keep one of two concurrent conditional writes.

    Raises SourceUnavailable, also if the server does not honour conditional writes, which only a
    store that is opened for writing finds out.
    """
    url = urlsplit(root)
    if "@" in url.netloc:  # the part before it may be a secret
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
    return S3Store(
        url.netloc,
        prefix,
        endpoint_url,
        read_only=read_only,
        is_impatient=is_impatient,
        single_writer=single_writer,
    )


class S3Store:
    """Stores objects below a prefix of one bucket. Thread-safe.

    A server that ignores the condition of `put_if_absent`, or checks it before it writes, would
    lose records silently, so each start tests the former and the first start the latter, and raises
    SourceUnavailable if it fails. Credentials that may only read are no failure.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        endpoint_url: str | None = None,
        *,
        read_only: bool = False,
        is_impatient: bool = False,
        single_writer: bool = False,
    ) -> None:
        self._single_writer = single_writer
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self._client = S3Client(bucket, endpoint_url, is_impatient=is_impatient)
        if not read_only:
            self.check_writes()

    # ---- reading -------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        data = self._read(key)
        assert data is not None, "without a range there is nothing to be past"
        return data

    def get_many(self, keys: Sequence[str]) -> Sequence[bytes]:
        if len(keys) < 2:
            return [self.get(key) for key in keys]
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            return list(pool.map(self.get, keys))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._read(key, Range=f"bytes={start}-{start + length - 1}") or b""

    def get_file(self, key: str, path: Path, how: Reading = JUST_READ) -> None:
        try:
            with _readable(key):
                download(self._client, self._full(key), path, f"read {key} in", how)
        except S3Error as error:
            if error.status != 416:  # an empty object has no byte to ask for
                raise
            path.write_bytes(b"")

    def size(self, key: str) -> int | None:
        try:
            return int(self._head(key)["ContentLength"])
        except ObjectNotFound:
            return None

    def list(self, prefix: str, start_after: str = "") -> Sequence[str]:
        found = self._list(prefix, {}, start_after)
        return [str(entry["Key"]).removeprefix(self._prefix) for entry in found]

    def describe(self, prefix: str) -> Sequence[StoredObject]:
        return [self._described(entry) for entry in self._list(prefix, {})]

    def describe_folder(self, folder: str, most: int) -> Sequence[StoredObject]:
        found = (self._described(entry) for entry in self._list(folder, {"Delimiter": "/"}))
        return list(islice(found, most))

    def folders(self, start_after: str, most: int) -> Sequence[str]:
        found: list[str] = []
        how = {"Delimiter": "/", "MaxKeys": min(most, MAX_KEYS)}
        for page in self._pages("", how, start_after):
            names = (each["Prefix"].removeprefix(self._prefix) for each in page["CommonPrefixes"])
            found += [name for name in names if not name.startswith(".") and name > start_after]
            if len(found) >= most:
                break
        return found[:most]

    def now_s(self) -> float:
        answer = self._client.call("list_objects_v2", "read the time from", MaxKeys=1)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        try:
            return parsedate_to_datetime(date).timestamp()
        except ValueError as error:
            raise SourceUnavailable(
                f"{self._client.where} does not say what time it is: its Date is {date!r}"
            ) from error

    def _described(self, entry: Answer) -> StoredObject:
        key, modified = str(entry["Key"]).removeprefix(self._prefix), entry["LastModified"]
        return StoredObject(key, int(entry["Size"]), modified.timestamp(), entry.get("ETag", ""))

    def _list(
        self, prefix: str, more: Mapping[str, Any], start_after: str = ""
    ) -> Generator[Answer, None, None]:
        for page in self._pages(prefix, more, start_after):
            yield from page["Contents"]

    def _pages(
        self, prefix: str, more: Mapping[str, Any], start_after: str = ""
    ) -> Generator[Answer, None, None]:
        request: dict[str, Any] = {"Prefix": self._prefix + prefix, **more}
        if start_after:
            request["StartAfter"] = self._prefix + start_after
        while True:
            page = self._client.call("list_objects_v2", f"list {prefix} in", **request)
            yield {"Contents": [], "CommonPrefixes": [], **page}
            if not page["IsTruncated"]:
                return
            request.pop("StartAfter", None)
            request["ContinuationToken"] = page["NextContinuationToken"]

    def has_any(self, prefix: str) -> bool:
        request = {"Prefix": self._prefix + prefix, "MaxKeys": 1}
        page = self._client.call("list_objects_v2", f"list {prefix} in", **request)
        return bool(page.get("Contents"))

    def _read(self, key: str, **conditions: str) -> bytes | None:
        """Return the object or the range asked for; None if that begins past the object's end.

        boto3 repeats a request until the body begins; this repeats it if the body is cut short.
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
                    return answer["Body"].read()
            except S3Error as error:
                if not error.is_broken_off or attempt == MAX_ATTEMPTS:
                    raise
            finally:
                answer["Body"].close()
        raise AssertionError("the last attempt returns or raises")

    def _get(self, key: str, conditions: dict[str, str]) -> Answer:
        full_key = self._full(key)
        with _readable(key):
            return self._client.call("get_object", f"read {key} in", Key=full_key, **conditions)

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
        if self._single_writer and self.size(key) is not None:
            return False
        writer = uuid.uuid4().hex
        request = {"Key": self._full(key), "Body": data, "Metadata": {"writer": writer}}
        for _ in range(MAX_CONFLICTS):
            try:
                self._client.call("put_object", f"write {key} to", **request, IfNoneMatch="*")
                return True
            except S3Error as error:
                if error.status == 412:
                    return error.was_repeated and self._is_written_by(key, writer)
                if error.status == 403 and error.code == "AccessDenied":
                    raise AccessDenied(str(error)) from error
                if error.status != 409:
                    raise
            time.sleep(
                CONFLICT_PAUSE_S
            )  # another writer is at work, and will soon have won or failed
        raise SourceUnavailable(
            f"cannot write {key} to {self._client.where}: "
            f"{MAX_CONFLICTS} attempts each met another writer"
        )

    def put_file(self, key: str, path: Path, sha256: str, on_bytes: OnBytes) -> None:
        full_key = self._full(key)
        try:
            upload(self._client, full_key, path, sha256, on_bytes, f"write {key} to")
        except OSError as error:
            raise SourceUnavailable(f"cannot read {path}: {error}") from error

    def remove(self, keys: Sequence[str]) -> None:
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            for _ in pool.map(self._remove, keys):
                pass

    def _remove(self, key: str) -> None:
        try:
            self._client.call("delete_object", f"remove {key} from", Key=self._full(key))
        except S3Error as error:
            if error.status == 403 and error.code == "AccessDenied":
                raise AccessDenied(str(error)) from error
            if error.status != 404:
                raise

    def _is_written_by(self, key: str, writer: str) -> bool:
        """Check whether an attempt whose answer was lost has written the object after all."""
        return self._head(key)["Metadata"].get("writer") == writer

    def check_writes(self) -> None:
        """Raise SourceUnavailable if the server lets a key that exists be written.

        The key stays, so from the second start on this takes one request, which must be refused.
        """
        if self._single_writer:
            return
        data = b"Every start tries to write this again, and a store that lets it is refused.\n"
        try:
            is_first = self.put_if_absent(PROBE_KEY, data)
        except AccessDenied as error:
            self._check_readable(error)
            _log.warning("%s can only be read with these credentials", self._client.where)
            return
        if is_first and self.put_if_absent(PROBE_KEY, data):
            raise SourceUnavailable(
                f"{self._client.where} cannot be used: it ignores If-None-Match, "
                f"so one of two concurrent writers would be lost silently; {_ALONE}"
            )
        if is_first and self._loses_overlapping_writes():
            self._forget(PROBE_KEY)  # so that the next start does not take it for tested
            raise SourceUnavailable(
                f"{self._client.where} cannot be used: of two writes with If-None-Match that "
                "overlap both succeed, so one would be lost silently; if it is OpenStack Swift, "
                f"set max_clients = 1 in its object servers; {_ALONE}"
            )

    def _check_readable(self, refusal: AccessDenied) -> None:
        try:
            self.has_any("probe/")
        except S3Error:
            raise refusal from None

    def _loses_overlapping_writes(self) -> bool:
        key = f"{OVERLAP_KEY}-{uuid.uuid4().hex}"
        url = self._client.presigned_put_if_absent(self._full(key))
        try:
            return do_both_succeed(url, lambda data: self.put_if_absent(key, data))
        except (OSError, HTTPException, SourceUnavailable) as error:
            _log.warning(
                "%s: whether overlapping writes are safe could not be tested: %r",
                self._client.where,
                error,
            )
            return False
        finally:
            self._forget(key)

    def _forget(self, key: str) -> None:
        """Remove an object of the probe, if that is allowed."""
        with suppress(SourceUnavailable):
            self._remove(key)

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)


@contextmanager
def _readable(key: str) -> Generator[None, None, None]:
    """Raise ObjectNotFound or ObjectChanged where that is what the server's answer means."""
    try:
        yield
    except S3Error as error:
        if error.code == "NoSuchKey":
            raise ObjectNotFound(f"there is no object {key}") from error
        if error.status == 412:
            raise ObjectChanged(f"{key} changed while it was downloaded") from error
        raise
