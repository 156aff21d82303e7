"""Copy an object from a bucket to a file: ranges of one state of it, each resumed where it was cut.

The first answer tells the object's size and ETag; all other requests are for that ETag alone, so
what is written is never of two states. boto3's own downloads begin a range anew when it is cut, and
cannot be stopped.
"""

# pyright: reportMissingTypeStubs=false

import os
import random
import re
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_store.errors import DownloadStopped
from adapter_store.object_store import Reading
from adapter_store.s3_client import MAX_ATTEMPTS, Answer, S3Client, S3Error
from adapter_store.s3_transfers import NUM_CONNECTIONS

PART_BYTES = 8 * 2**20
PIECE_BYTES = 2**18  # between two looks at whether the download is still wanted
MUCH_BYTES = 2**20  # after so many more, what failed before does not count
PAUSE_S = 0.1  # after the first failure, on average half of it; twice as long after each other one

_CONTENT_RANGE = re.compile(r"bytes ([0-9]+)-([0-9]+)/([0-9]+)")


def download(client: S3Client, key: str, path: Path, doing: str, how: Reading) -> None:
    """Write an object to a file; one that fails leaves none.

    `doing` completes "cannot ... bucket". Raises OSError if the file cannot be written,
    DownloadStopped, S3Error of status 416 for an empty object, which has no range to ask for, and
    of status 412 for one that is not, or not any more, what `how` asks for.
    """
    try:
        with path.open("wb") as file:
            _Download(client, key, doing, how).write_to(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@dataclass(slots=True)
class _Part:
    """Bytes that are still to come."""

    position: int
    end: int


class _Download:
    def __init__(self, client: S3Client, key: str, doing: str, how: Reading) -> None:
        self._client, self._key, self._doing, self._how = client, key, doing, how
        self._etag = how.etag
        self._has_failed = threading.Event()  # in one of the parts
        self._counting = threading.Lock()

    def write_to(self, descriptor: int) -> None:
        first = _Part(0, PART_BYTES)
        answer = self._ask(first)
        num_bytes = _total(answer)
        self._etag = str(answer.get("ETag", ""))
        first.end = min(num_bytes, PART_BYTES)
        others = [
            _Part(start, min(num_bytes, start + PART_BYTES))
            for start in range(PART_BYTES, num_bytes, PART_BYTES)
        ]
        if not others:
            self._fill(first, descriptor, answer)
            return
        with ThreadPoolExecutor(min(NUM_CONNECTIONS, 1 + len(others))) as pool:
            parts = [pool.submit(self._fill, first, descriptor, answer)]
            parts += [pool.submit(self._fill, part, descriptor) for part in others]
            try:
                _raise_first(parts)
            finally:
                self._has_failed.set()  # so that nothing is waited for after a failure

    def _fill(self, part: _Part, descriptor: int, answer: Answer | None = None) -> None:
        """Write one part, in as many requests as it takes; boto3 repeats what has no answer."""
        num_failures = 0
        while part.position < part.end:
            begun = part.position
            try:
                self._copy(answer or self._ask(part), part, descriptor)
            except _Cut as cut:
                num_failures = 1 if part.position - begun >= MUCH_BYTES else num_failures + 1
                if num_failures >= MAX_ATTEMPTS:
                    raise cut.reason from cut
                self._has_failed.wait(random.uniform(0, PAUSE_S * 2 ** (num_failures - 1)))
            answer = None

    def _copy(self, answer: Answer, part: _Part, descriptor: int) -> None:
        """Write what comes of a part. Raises _Cut if that is not all."""
        with closing(answer["Body"]) as body:
            while part.position < part.end:
                self._check_wanted()
                piece = self._read(body, min(PIECE_BYTES, part.end - part.position))
                _write(descriptor, piece, part.position)
                part.position += len(piece)
                with self._counting:
                    self._how.on_bytes(len(piece))

    def _read(self, body: Any, num_bytes: int) -> bytes:
        try:
            with self._client.errors(self._doing):
                piece: bytes = body.read(num_bytes)
        except S3Error as error:
            if error.is_broken_off:
                raise _Cut(error) from error
            raise
        if not piece:
            raise _Cut(self._client.error(self._doing, "the answer ended too early"))
        return piece

    def _ask(self, part: _Part) -> Answer:
        self._check_wanted()
        condition = {"IfMatch": self._etag} if self._etag else {}
        wanted = f"bytes={part.position}-{part.end - 1}"
        answer = self._client.call(
            "get_object", self._doing, Key=self._key, Range=wanted, **condition
        )
        reason, status = "", 0
        if not _is_range(answer, part):
            reason = "it does not answer with the range asked"
        elif self._etag and str(answer.get("ETag", self._etag)) != self._etag:
            reason, status = "it has changed", 412  # some servers know no If-Match
        if reason:
            answer["Body"].close()
            raise S3Error(f"cannot {self._doing} {self._client.where}: {reason}", status)
        return answer

    def _check_wanted(self) -> None:
        if self._has_failed.is_set() or not self._how.is_wanted():
            raise DownloadStopped(f"{self._key} is not wanted any more")


class _Cut(Exception):
    """The body of an answer was cut short."""

    def __init__(self, reason: S3Error) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _is_range(answer: Answer, part: _Part) -> bool:
    """Check that an answer is of the part, as far as the object goes, or is an object that fits."""
    if "ContentRange" not in answer:
        return part.position == 0 and answer.get("ContentLength", part.end + 1) <= part.end
    found = _CONTENT_RANGE.fullmatch(answer["ContentRange"])
    if found is None:
        return False
    start, last, total = map(int, found.groups())
    return start == part.position and last == min(part.end, total) - 1


def _total(answer: Answer) -> int:
    """Read the size of the whole object from an answer that `_is_range` has accepted."""
    found = _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
    return int(answer["ContentLength"]) if found is None else int(found[3])


def _raise_first(parts: Sequence["Future[None]"]) -> None:
    """Wait for all parts, or for the first one that fails."""
    ended, _ = wait(parts, return_when=FIRST_EXCEPTION)
    for part in ended:
        part.result()


def _write(descriptor: int, piece: bytes, position: int) -> None:
    while piece:
        written = os.pwrite(descriptor, piece, position)
        piece, position = piece[written:], position + written
