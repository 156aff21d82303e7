"""Journal: requests that run or have just ended, in memory that outlives the process.

It is a file that is mapped into memory, with a slot for each request. Writing to it is a copy of a
few bytes, without a system call; whatever is there when the process is killed stays in the file,
because the pages belong to the system. So the next process on this machine finds what every
request had cost. Only a crash of the machine loses what was not flushed.

A slot's state is written last and alone, so a kill at any moment leaves a slot that can be read.
"""

import fcntl
import logging
import mmap
import os
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"reefuse1"
HEADER_BYTES = 4096
NUM_SLOTS, SLOT_BYTES = 8192, 2048
FREE, LIVE, ENDED = 0, 1, 2
MAX_TEXT_BYTES = SLOT_BYTES - 128

_HEADER = struct.Struct("<8sII")  # magic, slots, bytes of one
_LOST = struct.Struct("<QQQ")  # requests, prompt tokens, output tokens
_LOST_AT = 64
_STATE = struct.Struct("<I")
_LENGTH = struct.Struct("<I")
_READ = struct.Struct("<QQQdd")  # prompt, cached, load bytes; queue, TTFT (-1: none)
_SENT = struct.Struct("<QQ")  # output, reasoning
_END = struct.Struct("<dII")  # E2E; status, reasons
_LENGTH_AT, _READ_AT, _SENT_AT, _END_AT, _TEXT_AT = 4, 8, 48, 64, 128

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Slot:
    """What a slot holds. `text` is what was known when the request began."""

    is_live: bool
    text: bytes
    read: tuple[int, int, int, float, float]
    sent: tuple[int, int]
    end: tuple[float, int, int]


class Journal:
    """The slots of one process. Begin and end in the event loop; `take_ended` in the writer."""

    def __init__(self, memory: mmap.mmap, descriptor: int | None, num_slots: int) -> None:
        self._memory = memory
        self._descriptor = descriptor  # holds the lock
        self._num_slots = num_slots
        self._free = deque(range(num_slots))
        self._ended: deque[int] = deque()

    @classmethod
    def create(cls, path: Path, num_slots: int = NUM_SLOTS) -> "Journal":
        """Make the file and lock it. Without room on disk it is memory alone, and an error is
        logged: requests are served and recorded, but a kill loses those that are not flushed."""
        size = HEADER_BYTES + num_slots * SLOT_BYTES
        try:
            descriptor = _made(path, size)
        except OSError as error:
            logger.error("usage: %s cannot be made, a kill would lose records: %s", path, error)
            return cls(mmap.mmap(-1, size), None, num_slots)
        memory = mmap.mmap(descriptor, size)
        memory[: _HEADER.size] = _HEADER.pack(MAGIC, num_slots, SLOT_BYTES)
        return cls(memory, descriptor, num_slots)

    @property
    def num_taken(self) -> int:
        """Slots of requests that run, or that have ended and are not flushed."""
        return self._num_slots - len(self._free)

    def begin(self, text: bytes) -> int | None:
        """Take a slot; None if there is none, or if the text is too long."""
        if not self._free or len(text) > MAX_TEXT_BYTES:
            return None
        slot = self._free.popleft()
        at, memory = self._at(slot), self._memory
        memory[at + _TEXT_AT : at + _TEXT_AT + len(text)] = text
        _LENGTH.pack_into(memory, at + _LENGTH_AT, len(text))
        self.read(slot, 0, 0, 0, 0.0, -1.0)
        self.sent(slot, 0, 0)
        _END.pack_into(memory, at + _END_AT, 0.0, 0, 0)
        _STATE.pack_into(memory, at, LIVE)
        return slot

    def read(
        self, slot: int, prompt: int, cached: int, load_bytes: int, queue_s: float, ttft_s: float
    ) -> None:
        at = self._at(slot) + _READ_AT
        _READ.pack_into(self._memory, at, prompt, cached, load_bytes, queue_s, ttft_s)

    def sent(self, slot: int, output: int, reasoning: int) -> None:
        _SENT.pack_into(self._memory, self._at(slot) + _SENT_AT, output, reasoning)

    def end(self, slot: int, e2e_s: float, status: int, reasons: int) -> None:
        at = self._at(slot)
        _END.pack_into(self._memory, at + _END_AT, e2e_s, status, reasons)
        _STATE.pack_into(self._memory, at, ENDED)
        self._ended.append(slot)

    def lose(self, prompt: int, output: int) -> None:
        """Count a request that had no slot."""
        lost = self.lost
        new = lost[0] + 1, lost[1] + prompt, lost[2] + output
        _LOST.pack_into(self._memory, _LOST_AT, *new)

    @property
    def lost(self) -> tuple[int, int, int]:
        """Requests without a record, their prompt and their output tokens, since the start."""
        return _LOST.unpack_from(self._memory, _LOST_AT)

    def ended(self, most: int) -> list[Slot]:
        """Return the oldest slots that have ended; they stay until `free`."""
        few = [self._ended[at] for at in range(min(most, len(self._ended)))]
        return [_slot(self._memory, self._at(slot)) for slot in few]

    def free(self, count: int) -> None:
        """Free the oldest slots that have ended: their records are flushed."""
        for _ in range(count):
            slot = self._ended.popleft()
            _STATE.pack_into(self._memory, self._at(slot), FREE)
            self._free.append(slot)

    def close(self) -> None:
        """Give up the lock. The file stays; whoever finds it takes what it holds."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # mmap holds a duplicate
            os.close(self._descriptor)
            self._descriptor = None

    def _at(self, slot: int) -> int:
        return HEADER_BYTES + slot * SLOT_BYTES


class DeadJournal:
    """The journal of a process that has ended, locked by this one."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as memory:
            magic, num_slots, slot_bytes = _HEADER.unpack_from(memory, 0)
            is_whole = len(memory) == HEADER_BYTES + num_slots * slot_bytes
            # One without a header was killed before it began any request.
            is_read = magic == MAGIC and slot_bytes == SLOT_BYTES and is_whole
            self.slots = list(_slots(memory, num_slots)) if is_read else []
            self.lost: tuple[int, int, int] = _LOST.unpack_from(memory, _LOST_AT)

    @classmethod
    def open(cls, path: Path) -> "DeadJournal | None":
        """Lock a journal; None if its process lives, or if it is gone."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink and os.fstat(descriptor).st_size >= HEADER_BYTES:
                return cls(path, descriptor)
            if os.fstat(descriptor).st_nlink:
                path.unlink()  # killed as it was made
        except BlockingIOError:
            pass
        os.close(descriptor)
        return None

    def remove(self) -> None:
        self._path.unlink()
        os.close(self._descriptor)

    def release(self) -> None:
        """Leave it for another try."""
        os.close(self._descriptor)


def _made(path: Path, size: int) -> int:
    """Make a locked file that has its room on disk: a write to a hole could end the process."""
    draft = path.with_suffix(".new")
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(descriptor, 0, size)
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    return descriptor


def _slots(memory: mmap.mmap, num_slots: int) -> Iterator[Slot]:
    for number in range(num_slots):
        at = HEADER_BYTES + number * SLOT_BYTES
        if _STATE.unpack_from(memory, at)[0] in (LIVE, ENDED):
            yield _slot(memory, at)


def _slot(memory: mmap.mmap, at: int) -> Slot:
    length = min(_LENGTH.unpack_from(memory, at + _LENGTH_AT)[0], MAX_TEXT_BYTES)
    return Slot(
        _STATE.unpack_from(memory, at)[0] == LIVE,
        memory[at + _TEXT_AT : at + _TEXT_AT + length],
        _READ.unpack_from(memory, at + _READ_AT),
        _SENT.unpack_from(memory, at + _SENT_AT),
        _END.unpack_from(memory, at + _END_AT),
    )
