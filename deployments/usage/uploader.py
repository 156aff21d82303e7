"""Uploader: brings closed segments to the object store as gzipped lines of JSON, then removes them.

A segment's name and content never change, and the same content gives the same bytes, so an upload
that is repeated after a crash or an error writes what is there already.
"""

import fcntl
import gzip
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapter_store.errors import AdapterStoreError
from adapter_store.object_store import ObjectStore
from deployments.usage.recovery import recover
from deployments.usage.spool import CLOSED, closed_segments, read_segment

PREFIX = "usage/"
SUFFIX = ".jsonl.gz"
DAMAGED = ".damaged"
LEVEL = 6

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class UploadCounts:
    segments: int = 0
    failures: int = 0
    damaged_lines: int = 0
    recovered_records: int = 0


class Uploader:
    """One process of a machine uploads at a time, whosever the segments are."""

    def __init__(self, folder: Path, store: ObjectStore | None) -> None:
        self._folder = folder
        self._store = store
        self.counts = UploadCounts()

    def run(self) -> None:
        """Recover what dead processes have left, then upload. Errors are counted and logged."""
        with _only_one(self._folder) as is_ours:
            if is_ours:
                self._recover()
                if self._store is not None:
                    self._upload_all(self._store)

    def _upload_all(self, store: ObjectStore) -> None:
        for path in closed_segments(self._folder):
            if not self._upload(store, path):
                return  # the store is out of reach: the next one would wait as long

    def _recover(self) -> None:
        try:
            self.counts.recovered_records += recover(self._folder)
        except OSError as error:
            self.counts.failures += 1
            logger.error("usage: what a dead process left cannot be read: %s", error)

    def _upload(self, store: ObjectStore, path: Path) -> bool:
        try:
            self._put(store, path)
        except (AdapterStoreError, OSError) as error:
            self.counts.failures += 1
            logger.error("usage: %s stays here, it cannot be uploaded: %s", path.name, error)
            return False
        return True

    def _put(self, store: ObjectStore, path: Path) -> None:
        lines = list(read_segment(path))
        whole = [line for line in lines if line is not None]
        num_damaged = len(lines) - len(whole)
        data = gzip.compress(b"".join(line + b"\n" for line in whole), LEVEL, mtime=0)
        key = PREFIX + path.name.removesuffix(CLOSED) + SUFFIX
        if whole and not store.put_if_absent(key, data) and store.get(key) != data:
            raise OSError(f"the store has another {key} already")
        self.counts.segments += 1
        if not num_damaged:
            path.unlink()
            return
        self.counts.damaged_lines += num_damaged
        kept = path.with_suffix(DAMAGED)
        path.rename(kept)
        logger.error("usage: %d lines of %s are damaged; it stays", num_damaged, kept)


@contextmanager
def _only_one(folder: Path) -> Generator[bool]:
    descriptor = os.open(folder / "upload.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
