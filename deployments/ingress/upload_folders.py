"""UploadFolders: a folder on local disk for each upload, of which nothing stays.

A folder goes with its upload, whatever becomes of that. What a process left that was killed is
removed by the next one: a lock tells a folder that is in use from one that is not.
"""

import errno
import os
import shutil
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from adapter_store.file_lock import FileLock
from deployments.ingress.http_errors import ApiError

_PREFIX = "upload-"
_FULL = (errno.ENOSPC, errno.EDQUOT)

Piece = tuple[str, bytes]  # a file's name and what comes next in it


class UploadFolder:
    """The files of one upload. `close` may be called at any time, from any thread."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock
        self._files: dict[str, BinaryIO] = {}
        self._busy = threading.Lock()
        self._is_open = True

    def write(self, pieces: Sequence[Piece]) -> None:
        """Append to files; nothing once it is closed. Raises ApiError if the disk is full."""
        with self._busy:
            if not self._is_open:
                return
            try:
                for name, data in pieces:
                    if name not in self._files:
                        self._files[name] = (self.path / name).open("xb")
                    self._files[name].write(data)
            except OSError as error:
                raise disk_error(error) from error

    def finish(self) -> None:
        """Close the files, which are whole now. Raises ApiError if the disk is full."""
        with self._busy:
            try:
                for file in self._files.values():
                    file.close()
            except OSError as error:
                raise disk_error(error) from error

    def close(self) -> None:
        """Remove all of it."""
        with self._busy:
            if not self._is_open:
                return
            self._is_open = False
            for file in self._files.values():
                with suppress(OSError):  # what was still to be written does not matter
                    file.close()
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock.release()

    def __enter__(self) -> "UploadFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class UploadFolders:
    """Makes the folders below one root, which other processes may use as well."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()

    def open(self) -> UploadFolder:
        """Make an empty folder. Raises ApiError if the disk is full."""
        path = self._root / f"{_PREFIX}{uuid.uuid4().hex}"
        try:
            lock = FileLock.acquire(_lock_of(path))
            assert lock is not None, "acquire waits"
            path.mkdir()
        except OSError as error:
            raise disk_error(error) from error
        return UploadFolder(path, lock)

    def _remove_leftovers(self) -> None:
        for name in os.listdir(self._root):
            path = self._root / name.removesuffix(".lock")
            if not name.startswith(_PREFIX):
                continue
            lock = FileLock.acquire(_lock_of(path), wait=False)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                lock.release()


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def disk_error(error: OSError) -> ApiError | OSError:
    """Translate an error of writing an upload; one that is no full disk stays what it is."""
    if error.errno in _FULL:
        return ApiError(
            507,
            "The server's disk has no room for this upload now.",
            "server_error",
            code="disk_full",
        )
    return error
