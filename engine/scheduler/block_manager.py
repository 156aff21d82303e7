"""BlockManager: who holds which KV block, and which blocks hold content worth finding again.

A block is in one of three states:

    free    no reference, no content:   in `_free`
    cached  no reference, known content: in `_cached` (oldest first) and findable by its hash
    held    one reference or more:       findable too, once its content is complete

Nothing tracks "held" by itself: it is every block with a reference. Block contents are immutable
once published, so a block that is shared or published is copied before it is written.

The hash of a block covers all tokens before it and starts at the request's CacheScope, so equal
hashes mean equal KV: same tenant scope, salt and adapter digest, same tokens.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engine.scheduler.request import CacheScope


def scope_hash(scope: CacheScope) -> bytes:
    """Root of a chain. Every field is length-prefixed, so no two scopes serialize alike."""
    h = hashlib.blake2b(digest_size=16)
    for field in (scope.tenant, scope.salt, scope.adapter):
        raw = field.encode()
        h.update(len(raw).to_bytes(8, "little") + raw)
    return h.digest()


def block_hash(previous: bytes, token_ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(previous + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockManager:
    """Allocates KV blocks 0..num_blocks-1 with reference counts and a prefix cache."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free: list[int] = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that an allocation may take: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix. Takes no reference: follow with `share`."""
        found: list[int] = []
        for h in hashes:
            block = self._by_hash.get(h)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Append blocks until `table` covers `num_tokens`; False and no change if blocks lack."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing <= 0:
            return True
        if missing > self.num_available:
            return False
        table.extend(self._take() for _ in range(missing))
        return True

    def frozen(self, table: Sequence[int], start: int, end: int) -> list[int]:
        """Indexes into `table` of the blocks under positions [start, end) that others may read."""
        first, last = start // self.block_size, min(self.blocks_for(end), len(table))
        references, hashes = self._references, self._hashes
        return [
            i
            for i in range(first, last)
            if references[table[i]] > 1 or hashes[table[i]] is not None
        ]

    def make_private(self, table: list[int], frozen: Iterable[int]) -> list[tuple[int, int]]:
        """Replace these blocks of the table by new ones; as many must be available.

        Returns the (source, destination) copies to make before anything is written.
        """
        copies: list[tuple[int, int]] = []
        for i in frozen:
            source, table[i] = table[i], self._take()
            copies.append((source, table[i]))
            self._drop(source)
        return copies

    def free(self, table: list[int]) -> None:
        """Drop one reference to each and empty the table. The tail becomes evictable first."""
        for block in reversed(table):
            self._drop(block)
        table.clear()

    def publish(self, block: int, content: bytes) -> None:
        """The held block is full and computed; from now on `find` may return it."""
        if self.prefix_caching and self._hashes[block] is None and content not in self._by_hash:
            self._hashes[block] = content
            self._by_hash[content] = block

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the state is exactly what these block tables imply."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        assert counts == self._references, "references differ from the tables that hold blocks"
        unheld = {b for b in range(self.num_blocks) if not counts[b]}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert free | cached == unheld and not free & cached, "an unheld block is lost or doubled"
        assert all(self._hashes[b] is None for b in free), "a free block still has content"
        assert all(self._hashes[b] is not None for b in cached), "a cached block has no content"
        known = {h: b for b, h in enumerate(self._hashes) if h is not None}
        assert known == self._by_hash, "the hash table differs from the blocks' hashes"

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        assert self._references[block] >= 0, f"block {block} was freed twice"
        if self._references[block]:
            return
        if self._hashes[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def _forget(self, block: int) -> None:
        content = self._hashes[block]
        if content is not None:
            del self._by_hash[content]
            self._hashes[block] = None
