"""MaskMemory: the masks of all slots, in memory that the engine shares with its grammars' process.

Bit t % 8 of byte t // 8 of a row says whether token t may be sampled.
"""

import mmap
import os


class MaskMemory:
    """`num_rows` for each slot. Whoever has the file descriptor sees the same rows."""

    def __init__(self, fd: int, num_slots: int, vocab_size: int, num_rows: int = 1) -> None:
        self.fd = fd
        self.num_slots = num_slots
        self.num_rows = num_rows
        self.vocab_size = vocab_size
        self.row_bytes = -(-vocab_size // 32) * 4  # whole words of 32 bits
        self.bytes = mmap.mmap(fd, num_slots * num_rows * self.row_bytes)

    @classmethod
    def create(cls, num_slots: int, vocab_size: int, num_rows: int = 1) -> "MaskMemory":
        fd = os.memfd_create("token masks")
        os.ftruncate(fd, num_slots * num_rows * (-(-vocab_size // 32) * 4))
        return cls(fd, num_slots, vocab_size, num_rows)

    def write(self, slot: int, mask: bytes | bytearray, at: int = 0) -> None:
        """Write a mask of any length; tokens beyond it, or the vocabulary, may not be sampled."""
        start, size = (slot * self.num_rows + at) * self.row_bytes, self.row_bytes
        row = bytearray(mask[: -(-self.vocab_size // 8)])
        if 8 * len(row) > self.vocab_size:  # an adapter may have token ids where these bits are
            row[-1] &= (1 << self.vocab_size % 8) - 1
        self.bytes[start : start + size] = row.ljust(size, b"\0")

    def close(self) -> None:
        os.close(self.fd)  # rows that are still in use keep the mapping
