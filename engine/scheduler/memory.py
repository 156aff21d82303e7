"""MemoryBudget: divides one arena between KV blocks and adapters, and decides evictions.

    0                                                                     memory_bytes
    | KV block 0 | 1 | 2 | ...   ->       free      <- | adapter | gap | adapter |

Block i is the bytes [i * block_bytes, (i + 1) * block_bytes). Adapters have extents of their own
size, from the high end down; KV blocks end below the lowest one. Unused content (cached blocks,
idle adapters) stays until its memory is needed and is then evicted, least recently used first; an
adapter that was used often counts as used later.
Before that, the lowest extents are moved up into gaps.

Every change is decided here and listed for the executor, which performs it in the same order.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice
from typing import NamedTuple

from engine.scheduler.adapter_slots import AdapterSlots
from engine.scheduler.batch import AdapterLoad, AdapterMove, Move
from engine.scheduler.block_manager import BlockManager
from engine.scheduler.extents import Extents, Shift, extent_size


class MemoryChanges(NamedTuple):
    """Changes that the executor must make, as in ScheduledBatch."""

    evictions: tuple[int, ...]
    moves: tuple[Move, ...]
    loads: tuple[AdapterLoad, ...]

    def __bool__(self) -> bool:
        return any(self[:])


@dataclass(frozen=True, slots=True)
class _Wish:
    """A demand: `num_blocks` free blocks in addition to held ones, and an extent if `size` > 0."""

    num_blocks: int
    digest: str = ""
    size: int = 0  # bytes; 0: no adapter, or it is placed already and stays


@dataclass(slots=True)
class _Plan:
    """An arrangement of the arena, and the changes that lead to it."""

    extents: Extents
    shifts: list[Shift]
    evicted: list[str]
    num_kept: int = 0  # cached blocks that stay


@dataclass(slots=True)
class _Pending:
    """Changes that no batch carries yet."""

    evictions: list[int] = field(default_factory=list[int])
    moves: list[Move] = field(default_factory=list[Move])
    loads: list[AdapterLoad] = field(default_factory=list[AdapterLoad])


class MemoryBudget:
    """Keeps KV blocks and adapters together within `memory_bytes`."""

    def __init__(
        self,
        memory_bytes: int,
        block_bytes: int,
        blocks: BlockManager,
        adapters: AdapterSlots,
        *,
        max_adapter_bytes: int | None = None,
        max_adapters: int | None = None,
    ) -> None:
        assert blocks.num_blocks == memory_bytes // block_bytes
        self.block_bytes = block_bytes
        self.blocks = blocks
        self.adapters = adapters
        self.max_adapter_bytes = memory_bytes if max_adapter_bytes is None else max_adapter_bytes
        self.max_adapters = max_adapters  # on the device or on the way there; None: no limit
        self._extents = Extents(memory_bytes)
        self._is_packed = True  # no gap takes the lowest extent
        self._pending = _Pending()
        self._step = 0

    @property
    def adapter_bytes(self) -> int:
        """Bytes of adapters that are resident or being loaded."""
        return self._extents.used_bytes

    @property
    def num_reachable_blocks(self) -> int:
        """Blocks that KV could have if every idle adapter were evicted."""
        idle = sum(self._extents.size(digest) for digest, _ in self.adapters.idle)
        return self._blocks_beside(self._extents.used_bytes - idle)

    def share_of_adapters(self, digests: Iterable[str]) -> float:
        """Return the part of the room for adapters that these take, on the device or not."""
        sizes = [self.adapters.nbytes(digest) or 0 for digest in digests]
        nbytes, most = sum(map(extent_size, sizes)), max(self.max_adapter_bytes, 1)
        by_count = len(sizes) / self.max_adapters if self.max_adapters else 0.0
        return max(nbytes / most, by_count)

    def lacking_bytes(self, num_tokens: int, digest: str) -> tuple[int, int] | None:
        """Bytes (needed, available) if this request can never fit, else None.

        An adapter whose size is not known yet counts as empty.
        """
        nbytes = self.adapters.nbytes(digest) if digest else None
        size = 0 if nbytes is None else extent_size(nbytes)
        if size > self.max_adapter_bytes:
            return size, self.max_adapter_bytes
        num_blocks = self.blocks.blocks_for(num_tokens)
        if num_blocks <= self._blocks_beside(size):
            return None
        return num_blocks * self.block_bytes + size, self._extents.memory_bytes

    def reserve(self, num_blocks: int, digest: str = "", tables: Iterable[list[int]] = ()) -> bool:
        """Free `num_blocks` blocks and place the adapter; False, without change, if impossible.

        `tables` must be all block tables; blocks that move are replaced in them.
        """
        blocks, adapters = self.blocks, self.adapters
        is_placed = not digest or adapters.is_placed(digest)
        if is_placed and num_blocks <= blocks.num_free:
            return True
        if is_placed and self._evict_oldest_blocks(num_blocks - blocks.num_free):
            return True
        size = 0 if is_placed else self._size(digest)
        plan = self._plan(_Wish(num_blocks, digest, size))
        if plan is None and adapters.is_idle(digest) and adapters.is_on_host(digest):
            again = _Wish(
                num_blocks, digest, self._size(digest)
            )  # where it lies now may be the obstacle
            plan = self._plan(again, [digest])
        if plan is not None:
            self._follow(plan, digest, tables)
        return plan is not None

    def has_ready_blocks(self, count: int) -> bool:
        """Whether so many calls of `reserve(1)` succeed by free blocks and the oldest cached ones,
        which are evicted without a look at adapters."""
        missing = count - self.blocks.num_free
        return missing <= 0 or self._are_oldest(missing)

    def make_private(self, table: list[int], frozen: Iterable[int]) -> None:
        """As BlockManager.make_private; the copies go into the next batch."""
        self._pending.moves += self.blocks.make_private(table, frozen)

    def discard(self, digest: str, tables: Iterable[list[int]] = ()) -> None:
        """Evict an unpinned adapter whose bytes cannot be relied on."""
        if self.adapters.is_placed(digest) and not self.adapters.is_pinned(digest):
            self._evict([digest])
            self._set_limit(tables)

    def forget(self, tables: Iterable[list[int]] = ()) -> None:
        """Evict all cached blocks and idle adapters."""
        self.blocks.evict(self.blocks.num_cached)
        self._evict([digest for digest, _ in self.adapters.idle])
        self._set_limit(tables)

    def take_changes(self) -> MemoryChanges:
        """Return the changes that precede the step scheduled now, and advance the clock of uses."""
        pending, self._pending = self._pending, _Pending()
        if self.adapters.loads_are_immediate:
            for load in pending.loads:
                self.adapters.set_resident(load.digest)
        self.pass_steps(1)
        return MemoryChanges(tuple(pending.evictions), tuple(pending.moves), tuple(pending.loads))

    @property
    def has_changes(self) -> bool:
        """Whether there are changes that precede the step scheduled next."""
        pending = self._pending
        return bool(pending.evictions or pending.moves or pending.loads)

    def pass_steps(self, count: int) -> None:
        """Advance the clock of uses."""
        self._step += count
        self.blocks.step = self.adapters.step = self._step

    def check_integrity(self, tables: Sequence[Sequence[int]], pins: dict[str, int]) -> None:
        """Raise AssertionError unless blocks, adapters and their places in the arena agree."""
        self.blocks.check_integrity(tables)
        self.adapters.check_integrity(pins)
        self._extents.check_integrity()
        assert sorted(self._extents.digests) == sorted(self.adapters.placed)
        assert self.blocks.limit == self._limit(self._extents)
        assert self.blocks.limit * self.block_bytes <= self._extents.bottom
        assert self._is_packed == self._extents.is_packed
        assert not self._exceeds(self._extents.used_bytes, len(self._extents))

    # ==== choosing evictions ====

    def _evict_oldest_blocks(self, count: int) -> bool:
        """Handle the usual case fast: evicting the oldest cached blocks suffices."""
        if not self._are_oldest(count):
            return False
        self.blocks.evict(count)
        return True

    def _are_oldest(self, count: int) -> bool:
        """Whether so many cached blocks have not been used since any idle adapter."""
        if not self._is_packed or count > self.blocks.num_cached:
            return False
        oldest_idle = next((use for _, use in self.adapters.idle), self._step)
        return next(islice(self.blocks.cached_uses, count - 1, None)) <= oldest_idle

    def _plan(self, wish: _Wish, evicted: Sequence[str] = ()) -> _Plan | None:
        """Find the fewest evictions, by last use, that grant the wish; None if none do."""
        idle = [(d, use) for d, use in self.adapters.idle if d != wish.digest]
        gone = self._forced(wish, evicted, idle)
        num_forced = len(gone)
        plan = self._arranged(wish, gone, self.blocks.num_cached)
        if self._grants(wish, plan):
            return plan  # what the limits of adapters call for is enough, as nearly always
        idle = idle[num_forced - len(evicted) :]
        if not self._grants(wish, self._arranged(wish, [*gone, *(d for d, _ in idle)], 0)):
            return None
        victims = self._victims(idle)
        while not self._grants(wish, plan):
            victim = next(victims)
            if victim:
                gone.append(victim)
                plan = self._arranged(wish, gone, plan.num_kept)
            else:
                plan.num_kept -= 1
        return self._without_needless(wish, plan, num_forced)

    def _victims(self, idle: Sequence[tuple[str, int]]) -> Iterator[str]:
        """Yield what to evict next: a digest, or "" for a cached block; ties favour the block."""
        blocks = ((use, "") for use in self.blocks.cached_uses)
        return (victim for _, victim in merge(blocks, ((use, d) for d, use in idle)))

    def _without_needless(self, wish: _Wish, plan: _Plan, num_forced: int) -> _Plan:
        """Undo evictions that later ones made unnecessary."""
        for digest in reversed(plan.evicted[num_forced:]):
            fewer = [d for d in plan.evicted if d != digest]
            trial = self._arranged(wish, fewer, plan.num_kept)
            if self._grants(wish, trial):
                plan = trial
        return plan

    def _arranged(self, wish: _Wish, evicted: Sequence[str], num_kept: int) -> _Plan:
        """Arrange the arena without the evicted adapters and with the wished one.

        Extents move up only as far as KV blocks need it: nothing moves without a purpose.
        """
        extents = self._extents.without(evicted)
        fits_gap = wish.size and extents.gap_for(wish.size) is not None
        if fits_gap:
            extents.place(wish.digest, wish.size)
        needed = (self.blocks.num_held + num_kept + wish.num_blocks) * self.block_bytes
        if wish.size and not fits_gap:
            needed += wish.size
        shifts = extents.raise_bottom(needed, lambda digest: self._is_movable(digest, wish))
        shifts = [s for s in shifts if s.digest != wish.digest or not wish.size]
        if wish.size and not fits_gap:
            extents.place(wish.digest, wish.size)
        return _Plan(extents, shifts, list(evicted), num_kept)

    def _is_movable(self, digest: str, wish: _Wish) -> bool:
        """Loading adapters cannot move, except the wished one, which is not placed yet."""
        return not self.adapters.is_loading(digest) or (digest == wish.digest and wish.size > 0)

    def _grants(self, wish: _Wish, plan: _Plan) -> bool:
        needed = self.blocks.num_held + plan.num_kept + wish.num_blocks
        is_over = self._exceeds(plan.extents.used_bytes, len(plan.extents))
        return needed <= self._limit(plan.extents) and not is_over

    def _forced(
        self, wish: _Wish, evicted: Sequence[str], idle: Iterable[tuple[str, int]]
    ) -> list[str]:
        """Add those idle adapters to the evicted ones that must go by the limits of adapters."""
        extents, gone = self._extents, list(evicted)
        nbytes = extents.used_bytes + wish.size - sum(map(extents.size, gone))
        count = len(extents) + (wish.size > 0) - len(gone)
        for digest, _ in idle:
            if not self._exceeds(nbytes, count):
                break
            gone.append(digest)
            nbytes, count = nbytes - extents.size(digest), count - 1
        return gone

    def _exceeds(self, adapter_bytes: int, num_adapters: int) -> bool:
        is_crowded = self.max_adapters is not None and num_adapters > self.max_adapters
        return is_crowded or adapter_bytes > self.max_adapter_bytes

    def _limit(self, extents: Extents) -> int:
        """Number of blocks below the lowest extent; negative if an extent has a negative offset."""
        return extents.bottom // self.block_bytes

    def _blocks_beside(self, size: int) -> int:
        """Number of blocks that fit together with `size` bytes of adapters without gaps."""
        return (self._extents.top - size) // self.block_bytes if size else self.blocks.num_blocks

    def _size(self, digest: str) -> int:
        nbytes = self.adapters.nbytes(digest)
        assert nbytes is not None, f"adapter {digest} is wanted before it is ready"
        return extent_size(nbytes)

    # ==== applying a plan ====

    def _follow(self, plan: _Plan, digest: str, tables: Iterable[list[int]]) -> None:
        adapters, pending = self.adapters, self._pending
        self._evict(plan.evicted)
        self.blocks.evict(self.blocks.num_cached - plan.num_kept)
        for shift in plan.shifts:
            nbytes = adapters.nbytes(shift.digest) or 0
            slot = adapters.slot(shift.digest)
            pending.moves.append(AdapterMove(slot, shift.destination, nbytes))
        self._set_extents(plan.extents)
        if digest and not adapters.is_placed(digest):
            slot, nbytes = adapters.place(digest), adapters.nbytes(digest) or 0
            load = AdapterLoad(slot, digest, plan.extents.offset(digest), nbytes)
            pending.loads.append(load)
        self._set_limit(tables)

    def _set_limit(self, tables: Iterable[list[int]]) -> None:
        self._pending.moves += self.blocks.set_limit(self._limit(self._extents), tables)

    def _evict(self, digests: Sequence[str]) -> None:
        """Evict; pending moves of evicted adapters are dropped."""
        pending = self._pending
        for digest in digests:
            slot = self.adapters.evict(digest)
            pending.evictions.append(slot)
            pending.moves = [
                m for m in pending.moves if not (isinstance(m, AdapterMove) and m.slot == slot)
            ]
        self._set_extents(self._extents.without(digests))

    def _set_extents(self, extents: Extents) -> None:
        self._extents = extents
        self._is_packed = extents.is_packed
