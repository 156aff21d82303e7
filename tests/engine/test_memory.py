"""Tests the memory budget on an arena that records what was written where."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from engine.scheduler.adapter_slots import AdapterSlots
from engine.scheduler.batch import AdapterMove, BlockCopy
from engine.scheduler.block_manager import BlockManager
from engine.scheduler.extents import Extents, extent_size
from engine.scheduler.memory import MemoryBudget
from tests.engine.support.fake_arena import FakeArena

BLOCK_BYTES = 384  # not a multiple of an extent's alignment
NUM_BLOCKS = 19
MEMORY = NUM_BLOCKS * BLOCK_BYTES + 30
TOP = MEMORY // 256 * 256  # for adapters; less than all blocks
MIXED = {"a": 200, "b": 700, "c": 1500, "d": 3000, "e": 800, "f": 1300}
EQUAL = dict.fromkeys(MIXED, 1000)


def make_memory(
    sizes: dict[str, int],
    *,
    memory_bytes: int = MEMORY,
    max_adapter_bytes: int | None = None,
    max_adapters: int | None = None,
    loads_are_immediate: bool = True,
) -> MemoryBudget:
    memory = MemoryBudget(
        memory_bytes,
        BLOCK_BYTES,
        BlockManager(memory_bytes // BLOCK_BYTES, 1),  # a token is a block
        AdapterSlots(loads_are_immediate=loads_are_immediate),
        max_adapter_bytes=max_adapter_bytes,
        max_adapters=max_adapters,
    )
    for digest, nbytes in sizes.items():
        memory.adapters.set_ready(digest, nbytes)
    return memory


def blocks_beside(size: int) -> int:
    return (TOP - size) // BLOCK_BYTES if size else NUM_BLOCKS


class Tables:
    """Block tables, and the expected content of their blocks after the next step."""

    def __init__(self) -> None:
        self.tables: list[list[int]] = []
        self.labels: list[list[int]] = []
        self.adapters: list[str] = []

    @property
    def pins(self) -> dict[str, int]:
        used = [digest for digest in self.adapters if digest]
        return {digest: used.count(digest) for digest in used}


class Memory(RuleBasedStateMachine):
    """Creates, grows, forks, writes, publishes, finds and frees tables, together with adapters.

    Operations are random between steps; a step performs the changes, then writes new content.
    """

    @initialize(is_equal=st.booleans(), is_immediate=st.booleans())
    def start(self, is_equal: bool, is_immediate: bool) -> None:
        self.sizes = EQUAL if is_equal else MIXED
        self.memory = make_memory(self.sizes, loads_are_immediate=is_immediate)
        self.arena = FakeArena(MEMORY, BLOCK_BYTES, loads_are_immediate=is_immediate)
        self.held = Tables()
        self.unwritten: dict[int, None] = {}  # labels
        self.published: dict[bytes, int] = {}
        self.num_labels = 0

    @rule(num_blocks=st.integers(0, 8), digest=st.sampled_from(["", *MIXED]))
    def admit(self, num_blocks: int, digest: str) -> None:
        if not self._reserve(num_blocks, digest):
            return
        if digest and self.memory.adapters.acquire(digest) is None:
            assert self.memory.adapters.awaited_load(digest)
            return
        self.held.tables.append([])
        self.held.labels.append([])
        self.held.adapters.append(digest)
        self._grow(-1, num_blocks)

    @precondition(lambda self: self.held.tables)
    @rule(data=st.data(), num_blocks=st.integers(1, 4))
    def grow(self, data: st.DataObject, num_blocks: int) -> None:
        i = self._pick(data)
        if self._reserve(num_blocks):
            self._grow(i, num_blocks)

    @precondition(lambda self: self.held.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        i, held = self._pick(data), self.held
        if held.adapters[i]:
            assert self.memory.adapters.acquire(held.adapters[i])
        self.memory.blocks.share(held.tables[i])
        held.tables.append(list(held.tables[i]))
        held.labels.append(list(held.labels[i]))
        held.adapters.append(held.adapters[i])

    @precondition(lambda self: self.held.tables)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """Write the last block anew, as a private copy."""
        i = self._pick(data)
        table, labels = self.held.tables[i], self.held.labels[i]
        if not table:
            return
        frozen = self.memory.blocks.frozen(table, len(table) - 1, len(table))
        if self._reserve(len(frozen)):
            self.memory.make_private(table, frozen)
            if not frozen:
                self.unwritten.pop(labels[-1], None)
            labels[-1] = self._new_label()

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        content = data.draw(st.sampled_from(sorted(self.published)))
        found = self.memory.blocks.find([content])
        self.memory.blocks.share(found)
        self.held.tables.append(found)
        self.held.labels.append([self.published[content]] * len(found))
        self.held.adapters.append("")

    @precondition(lambda self: self.held.tables)
    @rule(data=st.data(), is_published=st.booleans())
    def free(self, data: st.DataObject, is_published: bool) -> None:
        i = self._pick(data)
        if is_published:
            self.step()
            self._publish(i)
        self.memory.blocks.free(self.held.tables.pop(i))
        self.held.labels.pop(i)
        if digest := self.held.adapters.pop(i):
            self.memory.adapters.release(digest)

    @precondition(lambda self: self.arena.arriving)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.arena.arriving) - 1))
        self.memory.adapters.set_resident(self.arena.arrive(index))

    @rule()
    def step(self) -> None:
        self.arena.change(*self.memory.take_changes())
        for table, labels in zip(self.held.tables, self.held.labels, strict=True):
            for block, label in zip(table, labels, strict=True):
                if label in self.unwritten:
                    for offset in range(BLOCK_BYTES // 128):
                        self.arena.write(block, offset, label)
        self.unwritten.clear()
        self._check_content()

    @invariant()
    def integrity(self) -> None:
        self.memory.check_integrity(self.held.tables, self.held.pins)

    def _check_content(self) -> None:
        blocks, adapters = self.memory.blocks, self.memory.adapters
        for table, labels in zip(self.held.tables, self.held.labels, strict=True):
            assert [self._content(block) for block in table] == labels
        for content, label in self.published.items():
            assert [self._content(block) for block in blocks.find([content])] in ([], [label])
        for digest in adapters.resident:
            assert self.arena.adapter(adapters.slot(digest)) == digest
        self.arena.check()

    def _content(self, block: int) -> object:
        first, *rest = (self.arena.read(block, i) for i in range(BLOCK_BYTES // 128))
        assert all(cell == first for cell in rest)
        return first

    def _reserve(self, num_blocks: int, digest: str = "") -> bool:
        """Reserve, and compare the evictions with a reference that counts bytes."""
        memory, adapters = self.memory, self.memory.adapters
        new = 0 if not digest or adapters.is_placed(digest) else extent_size(self.sizes[digest])
        idle = {d: use for d, use in adapters.idle if d != digest}
        in_use = [d for d in adapters.placed if d not in idle]
        stays = sum(extent_size(self.sizes[d]) for d in in_use) + new
        least = memory.blocks.num_held + num_blocks
        is_impossible = least > blocks_beside(stays)
        is_exact = self.sizes is EQUAL and not any(map(adapters.is_loading, adapters.placed))
        victims = self._victims(least, stays, idle) if is_exact else None
        num_cached, placed = memory.blocks.num_cached, set(adapters.placed)

        done = memory.reserve(num_blocks, digest, self.held.tables)

        assert not (done and is_impossible)
        if is_exact or not in_use:
            assert done == (not is_impossible)
        if done:
            assert memory.blocks.num_free >= num_blocks
            assert not digest or adapters.is_placed(digest)
        else:
            assert memory.blocks.num_cached == num_cached and set(adapters.placed) == placed
        if done and victims is not None:
            gone = [d for d in idle if not adapters.is_placed(d)]
            assert (num_cached - memory.blocks.num_cached, gone) == victims
        return done

    def _victims(self, least: int, stays: int, idle: dict[str, int]) -> tuple[int, list[str]]:
        """Return (cached blocks, adapters): the fewest, least recently used first, that suffice."""
        uses = list(self.memory.blocks.cached_uses)
        order = [(use, "") for use in uses] + [(use, d) for d, use in idle.items()]
        order.sort(key=lambda victim: victim[0])  # of equal uses, blocks come first
        size = extent_size(EQUAL["a"])
        for count in range(len(order) + 1):
            gone = [victim for _, victim in order[:count]]
            num_blocks = gone.count("")
            adapters = [d for d in idle if d in gone]
            limit = blocks_beside(stays + (len(idle) - len(adapters)) * size)
            if least + len(uses) - num_blocks <= limit:
                return num_blocks, adapters
        return len(uses), list(idle)

    def _grow(self, i: int, num_blocks: int) -> None:
        table = self.held.tables[i]
        self.memory.blocks.grow(table, len(table) + num_blocks)
        self.held.labels[i] += [self._new_label() for _ in range(num_blocks)]

    def _publish(self, i: int) -> None:
        for block, label in zip(self.held.tables[i], self.held.labels[i], strict=True):
            if label not in self.unwritten:
                self.memory.blocks.publish([block], [str(label).encode()])
                self.published[str(label).encode()] = label

    def _new_label(self) -> int:
        self.num_labels += 1
        self.unwritten[self.num_labels] = None
        return self.num_labels

    def _pick(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.held.tables) - 1))


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


# ==== evictions ====


def place(memory: MemoryBudget, *digests: str) -> None:
    """Load each adapter in a separate step; it is idle afterwards."""
    for digest in digests:
        assert memory.reserve(0, digest)
        memory.take_changes()
        assert memory.adapters.acquire(digest)
        memory.adapters.release(digest)


def cache(memory: MemoryBudget, num_blocks: int) -> list[bytes]:
    """Make this many cached blocks, last used now."""
    table: list[int] = []
    assert memory.reserve(num_blocks, "", [table])
    memory.blocks.grow(table, num_blocks)
    contents = [f"{memory.blocks.step}-{i}".encode() for i in range(num_blocks)]
    for block, content in zip(table, contents, strict=True):
        memory.blocks.publish([block], [content])
    memory.blocks.free(table)
    return contents


def test_an_idle_adapter_stays_until_kv_needs_its_memory() -> None:
    memory = make_memory({"a": 1000})
    place(memory, "a")
    room = memory.blocks.num_free
    assert memory.reserve(room)
    assert memory.adapters.resident == ("a",) and not memory.take_changes()
    assert memory.reserve(room + 1)
    assert memory.adapters.resident == ()
    assert memory.take_changes().evictions == (1,)
    assert memory.blocks.num_free == NUM_BLOCKS


def test_a_pinned_adapter_is_not_evicted_for_kv() -> None:
    memory = make_memory({"a": 1000})
    place(memory, "a")
    memory.adapters.acquire("a")
    assert not memory.reserve(memory.blocks.num_free + 1)
    assert memory.num_reachable_blocks == memory.blocks.num_free


@pytest.mark.parametrize("is_adapter_older", [True, False])
def test_the_least_recently_used_idle_memory_is_taken_first(is_adapter_older: bool) -> None:
    memory = make_memory({"a": 1000})
    if is_adapter_older:
        place(memory, "a")
        memory.take_changes()
    contents = cache(memory, 3)
    memory.take_changes()
    if not is_adapter_older:
        place(memory, "a")
    assert memory.reserve(memory.blocks.num_free + 1)
    assert len(memory.blocks.find(contents)) == (3 if is_adapter_older else 2)
    assert bool(memory.adapters.resident) == (not is_adapter_older)


def test_an_adapter_that_is_needed_takes_the_memory_of_cached_blocks() -> None:
    memory = make_memory({"d": 3000})
    cache(memory, NUM_BLOCKS)
    assert memory.reserve(0, "d")
    (load,) = memory.take_changes().loads
    assert load.offset_bytes + load.nbytes <= MEMORY
    assert memory.blocks.limit == memory.blocks.num_cached == load.offset_bytes // BLOCK_BYTES


def test_moved_blocks_change_in_all_tables_and_stay_cached() -> None:
    memory = make_memory({"a": 1000})
    low: list[int] = []
    high: list[int] = []
    memory.blocks.grow(low, 16)
    memory.blocks.grow(high, 3)
    memory.blocks.publish([18], [b"known"])
    memory.blocks.share(high)
    tables = [high, list(high)]
    memory.blocks.free(low)
    assert memory.reserve(0, "a", tables)
    changes = memory.take_changes()
    assert changes.moves == (BlockCopy(16, 0), BlockCopy(17, 1), BlockCopy(18, 2))
    assert tables == [[0, 1, 2], [0, 1, 2]]
    assert memory.blocks.find([b"known"]) == [2]
    memory.check_integrity(tables, {})


def test_a_pinned_adapter_moves_up_if_that_makes_room_for_kv() -> None:
    memory = make_memory({"a": 1000, "b": 700})
    place(memory, "a", "b")
    slot = memory.adapters.acquire("b")
    assert slot is not None
    assert memory.reserve(16)
    changes = memory.take_changes()
    assert changes.moves == (AdapterMove(slot, TOP - 768, 700),)
    assert memory.blocks.limit == (TOP - 768) // BLOCK_BYTES == 16


def test_an_adapter_evicted_in_the_same_step_is_not_moved() -> None:
    memory = make_memory({"a": 1000, "b": 700})
    place(memory, "a", "b")
    slot = memory.adapters.slot("b")
    memory.discard("a")
    memory.take_changes()
    assert memory.reserve(16) and memory.reserve(19)
    assert memory.take_changes() == ((slot,), (), ())


def test_an_extent_never_moves_over_itself_but_is_reloaded_once_idle() -> None:
    memory = make_memory({"b": 700, "d": 3000})
    place(memory, "b", "d")
    memory.adapters.acquire("d")
    whole = (TOP - extent_size(3000)) // BLOCK_BYTES
    assert not memory.reserve(whole)  # only the gap left by b would help, and d is larger
    memory.adapters.release("d")
    assert memory.reserve(whole, "d")
    (load,) = memory.take_changes().loads
    assert load.digest == "d" and load.offset_bytes == TOP - extent_size(3000)


def test_a_gap_is_reused() -> None:
    memory = make_memory({"a": 1000, "b": 700, "c": 900})
    place(memory, "a", "b")
    memory.discard("a")
    limit = memory.blocks.limit
    place(memory, "c")
    assert memory.blocks.limit == limit


def test_a_loading_adapter_is_neither_moved_nor_evicted() -> None:
    memory = make_memory({"a": 1000, "b": 700}, loads_are_immediate=False)
    place_b = memory.reserve(0, "b") and memory.take_changes().loads
    assert place_b and memory.adapters.acquire("b") is None
    most = memory.blocks.num_free
    assert not memory.reserve(most + 1)
    memory.adapters.set_resident("b")
    assert memory.adapters.acquire("b") == place_b[0].slot
    memory.adapters.release("b")
    assert memory.reserve(most + 1)


def test_an_arrival_is_ignored_if_its_adapter_was_evicted() -> None:
    memory = make_memory({"a": 1000}, loads_are_immediate=False)
    assert memory.reserve(0, "a")
    memory.take_changes()
    memory.discard("a")
    memory.adapters.set_resident("a")
    assert memory.adapters.resident == () and memory.blocks.limit == NUM_BLOCKS


def test_adapters_stay_within_their_own_limit() -> None:
    memory = make_memory({"a": 1000, "b": 700, "c": 900}, max_adapter_bytes=2000)
    place(memory, "a", "b", "c")
    assert memory.adapters.resident == ("b", "c")
    memory.adapters.acquire("b")
    memory.adapters.acquire("c")
    assert not memory.reserve(0, "a")
    assert memory.adapter_bytes == extent_size(700) + extent_size(900)


def test_nothing_is_evicted_without_need() -> None:
    """Evicting the oldest alone does not help: the one below does not fit its place."""
    memory = make_memory({"old": 200, "low": 1000, "idle": 2000})
    place(memory, "old", "low", "idle")
    memory.adapters.acquire("low")
    assert memory.reserve(memory.blocks.num_free + 4)
    assert memory.adapters.resident == ("old", "low")


def test_requests_that_can_never_fit_are_found_with_their_bytes() -> None:
    memory = make_memory({"d": 3000}, max_adapter_bytes=4000)
    most = (TOP - extent_size(3000)) // BLOCK_BYTES
    assert memory.lacking_bytes(19, "") is None
    assert memory.lacking_bytes(20, "") == (20 * BLOCK_BYTES, MEMORY)
    assert memory.lacking_bytes(most, "d") is None
    needed = (most + 1) * BLOCK_BYTES + extent_size(3000)
    assert memory.lacking_bytes(most + 1, "d") == (needed, MEMORY)
    assert memory.lacking_bytes(19, "unknown") is None
    assert make_memory({"d": 3000}, max_adapter_bytes=1000).lacking_bytes(1, "d") == (3072, 1000)


def test_extents_take_the_tightest_gap_and_its_high_end() -> None:
    extents = Extents(10 * 256)
    for digest, size in [("a", 512), ("b", 256), ("c", 768), ("d", 256)]:
        extents.place(digest, size)
    extents = extents.without(["a", "c"])
    assert extents.gap_for(256) == 9 * 256
    assert extents.gap_for(768) == 4 * 256
    assert extents.gap_for(1024) is None
    assert extents.place("e", 1024) < 0


def test_adapters_may_be_limited_in_number() -> None:
    memory = make_memory(EQUAL, max_adapters=2)
    for digest in "abc":
        assert memory.reserve(0, digest)
        memory.adapters.acquire(digest)
        memory.take_changes()
        if digest == "b":
            memory.adapters.release("a")
    assert sorted(memory.adapters.placed) == ["b", "c"]
    assert not memory.reserve(0, "d"), "both are in use"
    memory.check_integrity([], {"b": 1, "c": 1})
