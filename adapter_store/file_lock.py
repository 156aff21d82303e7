"""Lock out other processes, and other threads, by a flock on a file that exists while it is held.

The operating system frees the lock of a process that dies. Two holders in one process exclude each
other as two processes would.
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


class FileLock:
    """A held lock; `release` it once. Create with `acquire`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, path: Path, *, shared: bool = False, wait: bool = True) -> "FileLock | None":
        """Take the lock, after waiting for it; return None if `wait` is false and it is taken."""
        mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, mode)
            except BlockingIOError:
                os.close(descriptor)
                return None
            if _is_same_file(descriptor, path):
                return cls(path, descriptor)
            os.close(descriptor)  # a former holder has removed this file: lock the new one

    def release(self) -> None:
        """Release the lock, and remove its file unless there are other holders."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(self._descriptor, self._path):
                self._path.unlink()
        except BlockingIOError:
            pass  # shared: the last of its holders removes the file
        finally:
            os.close(self._descriptor)


@contextmanager
def exclusive_lock(path: Path) -> Generator[None, None, None]:
    """Hold an exclusive lock for the length of the block, after waiting for it."""
    lock = FileLock.acquire(path)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Check that the open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
