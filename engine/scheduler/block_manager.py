"""BlockManager: reference counts of KV blocks, and a prefix cache of their contents.

A block is in one of three states:

    free    no reference, no content:   in `_free`
    cached  no reference, known content: in `_cached` (oldest first) and found by its hash
    held    one reference or more:       found by its hash too, once its content is complete

"Held" has no list of its own: it is every block with a reference. Block contents are immutable
once published, so a shared or published block is copied before it is written.

Cached and held blocks are all below `limit`; memory above it may belong to adapters. The lowest
free block is taken first, which keeps blocks away from that end.

The hash of a block covers all tokens before it and starts at the request's tenant and salt. The
adapter enters it with the block in which it begins to act, together with that position. So equal
hashes mean equal KV: equal tokens in one scope, each computed with the same adapter or none.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush

from engine.scheduler.batch import BlockCopy
from engine.scheduler.request import CacheScope


def root_hash(scope: CacheScope) -> bytes:
    """Root of a chain, without the adapter. Its fields are length-prefixed, so that no two
    scopes serialize alike."""
    parts = [field.encode() for field in (scope.tenant, scope.salt)]
    return _hash(b"root", b"".join(len(part).to_bytes(8, "little") + part for part in parts))


def adapter_hash(previous: bytes, adapter_digest: str, start: int) -> bytes:
    """Link of a chain before the block that holds `start`, where the adapter begins to act."""
    return _hash(b"adapter", previous + start.to_bytes(8, "little") + adapter_digest.encode())


def block_contents(token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Return what is hashed of each whole block of these tokens."""
    content, step = array("q", token_ids).tobytes(), 8 * block_size
    return [content[at : at + step] for at in range(0, len(content) - step + 1, step)]


def block_hashes(previous: bytes, contents: Iterable[bytes]) -> list[bytes]:
    """Return the next links of a chain, one for each block."""
    hashes, of_blocks = list[bytes](), _hasher(b"block")
    for content in contents:
        hasher = of_blocks.copy()  # half the time of a new one
        hasher.update(previous + content)
        previous = hasher.digest()
        hashes.append(previous)
    return hashes


def _hash(kind: bytes, content: bytes) -> bytes:
    """Hash 16 bytes; equal contents of different kinds have different hashes."""
    hasher = _hasher(kind)
    hasher.update(content)
    return hasher.digest()


def _hasher(kind: bytes) -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=16, person=kind)


class BlockManager:
    """Allocates KV blocks 0..limit-1 with reference counts and a prefix cache.

    Callers must reserve first (MemoryBudget.reserve): allocation never evicts. `step` dates the
    last uses.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.limit = num_blocks
        self.step = 0
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free: list[int] = list(range(num_blocks))  # a heap, of blocks above `limit` too
        self._cached: OrderedDict[bytes, int] = OrderedDict()  # step of last use, oldest first

    @property
    def num_free(self) -> int:
        return self.limit - self.num_blocks + len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def cached_uses(self) -> Iterator[int]:
        """Yield the step of last use of each cached block, oldest first."""
        return iter(self._cached.values())

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix. Takes no reference: call `share` next."""
        found: list[int] = []
        for h in hashes:
            block = self._by_hash.get(h)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block."""
        for block in blocks:
            if self._references[block] == 0:
                content = self._hashes[block]
                assert content is not None, f"block {block} is shared and has no content"
                del self._cached[content]
            self._references[block] += 1

    def grow(self, table: list[int], num_tokens: int) -> None:
        """Append free blocks until `table` covers `num_tokens`."""
        count = self.blocks_for(num_tokens) - len(table)
        if count <= 0:
            return
        assert self.num_free >= count, f"{count} blocks are taken and {self.num_free} are free"
        free, references = self._free, self._references
        for _ in range(count):
            block = heappop(free)
            references[block] = 1
            table.append(block)

    def shrink(self, table: list[int], num_tokens: int) -> None:
        """Drop what `table` has beyond `num_tokens`."""
        num_kept = self.blocks_for(num_tokens)
        dropped, table[num_kept:] = table[num_kept:], []
        self.free(dropped)

    def frozen(self, table: Sequence[int], start: int, end: int) -> list[int]:
        """Indexes of blocks of `table` under positions [start, end) that are shared or known."""
        first, last = start // self.block_size, min(self.blocks_for(end), len(table))
        references, hashes = self._references, self._hashes
        return [
            i
            for i in range(first, last)
            if references[table[i]] > 1 or hashes[table[i]] is not None
        ]

    def make_private(self, table: list[int], frozen: Iterable[int]) -> list[BlockCopy]:
        """Replace these blocks of the table by free ones.

        Returns the copies that must be made, in order, before anything is written.
        """
        copies: list[BlockCopy] = []
        for i in frozen:
            source, table[i] = table[i], self._take()
            copies.append(BlockCopy(source, table[i]))
            self.free([source])
        return copies

    def free(self, table: list[int]) -> None:
        """Drop one reference to each block and empty the table. The tail is evicted first."""
        references, hashes, cached, step = self._references, self._hashes, self._cached, self.step
        for block in reversed(table):
            left = references[block] = references[block] - 1
            if left:
                assert left > 0, f"block {block} was freed twice"
            elif (content := hashes[block]) is None:
                heappush(self._free, block)
            else:
                cached[content] = step
        table.clear()

    def publish(self, blocks: Iterable[int], contents: Iterable[bytes]) -> None:
        """Make full and computed blocks findable by their hashes."""
        if not self.prefix_caching:
            return
        hashes, by_hash = self._hashes, self._by_hash
        for block, content in zip(blocks, contents, strict=True):
            if hashes[block] is None and content not in by_hash:
                hashes[block] = content
                by_hash[content] = block

    def evict(self, count: int) -> None:
        """Free the `count` least recently used cached blocks."""
        for _ in range(count):
            content, _ = self._cached.popitem(last=False)
            block = self._by_hash.pop(content)
            self._hashes[block] = None
            heappush(self._free, block)

    def set_limit(self, limit: int, tables: Iterable[list[int]]) -> list[BlockCopy]:
        """Shrink or grow the range of blocks; cached and held ones must fit below the limit.

        Blocks above it move into the lowest free ones, and `tables`, which must be all that hold
        any block, are updated. Returns the copies that must be made, in order.
        """
        assert self.num_held + self.num_cached <= limit <= self.num_blocks
        high = [b for b in range(limit, self.limit) if self._references[b] or self._hashes[b]]
        self.limit = limit
        moved = {block: heappop(self._free) for block in high}
        for source, destination in moved.items():
            self._rename(source, destination)
        if moved:
            for table in tables:
                table[:] = [moved.get(block, block) for block in table]
        return [BlockCopy(source, destination) for source, destination in moved.items()]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the state is exactly what these block tables imply."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        assert counts == self._references, "references differ from the tables that hold blocks"
        known = {h: b for b, h in enumerate(self._hashes) if h is not None}
        assert known == self._by_hash, "the hash table differs from the blocks' hashes"
        unheld = {b for b in range(self.num_blocks) if not counts[b]}
        free, cached = set(self._free), {self._by_hash[h] for h in self._cached}
        assert len(free) == len(self._free), "a block is free twice"
        assert free | cached == unheld and not free & cached, "an unheld block is lost or doubled"
        assert all(self._hashes[b] is None for b in free), "a free block still has content"
        assert all(b in free for b in range(self.limit, self.num_blocks)), "used above the limit"
        uses = list(self._cached.values())
        assert uses == sorted(uses), "cached blocks out of order"

    def _take(self) -> int:
        assert self.num_free > 0, "a block is taken and none is free"
        block = heappop(self._free)
        self._references[block] = 1
        return block

    def _rename(self, source: int, destination: int) -> None:
        """Transfer state and content of `source` to the free `destination`, tables excepted."""
        self._references[destination], self._references[source] = self._references[source], 0
        content = self._hashes[destination] = self._hashes[source]
        self._hashes[source] = None
        if content is not None:
            self._by_hash[content] = destination
        heappush(self._free, source)
