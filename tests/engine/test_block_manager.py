"""Tests the block manager against its block tables, after any sequence of operations."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.scheduler.block_manager import (
    BlockManager,
    adapter_hash,
    block_contents,
    block_hashes,
    root_hash,
)
from engine.scheduler.request import CacheScope

BLOCK = 4


class Blocks(RuleBasedStateMachine):
    """Operates on tables of random tokens; the model is the expected content of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(12, BLOCK)
        self.tables: list[list[int]] = []
        self.tokens: list[list[int]] = []
        self.content: dict[int, list[int]] = {}  # block -> all tokens up to its end

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def start(self, tokens: list[int]) -> None:
        hashes = self._hashes(tokens)[: (len(tokens) - 1) // BLOCK]
        table = self.manager.find(hashes)
        for i, block in enumerate(table):
            assert self.content[block] == tokens[: (i + 1) * BLOCK]
        self.manager.share(table)
        if not self._free_up(self.manager.blocks_for(len(tokens)) - len(table)):
            self.manager.free(table)
            return
        self.manager.grow(table, len(tokens))
        self.tables.append(table)
        self.tokens.append(list(tokens))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        table, tokens = self._pick(data)
        for i, h in enumerate(self._hashes(tokens)):
            already = self.manager.find(self._hashes(tokens)[: i + 1])
            self.manager.publish([table[i]], [h])
            if len(already) <= i:
                self.content[table[i]] = tokens[: (i + 1) * BLOCK]

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), extra=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def append(self, data: st.DataObject, extra: list[int]) -> None:
        table, tokens = self._pick(data)
        start, end = len(tokens), len(tokens) + len(extra)
        before = list(table)
        frozen = self.manager.frozen(table, start, end)
        needed = self.manager.blocks_for(end) - len(table) + len(frozen)
        if not self._free_up(needed):
            return
        copies = self.manager.make_private(table, frozen)
        self.manager.grow(table, end)
        assert [old for old, new in zip(before, table, strict=False) if old != new] == [
            copy.source for copy in copies
        ]
        tokens.extend(extra)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table, tokens = self._pick(data)
        self.manager.share(table)
        self.tables.append(list(table))
        self.tokens.append(list(tokens))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.tables) - 1))
        self.manager.free(self.tables.pop(i))
        self.tokens.pop(i)

    @rule(limit=st.integers(0, 12))
    def change_limit(self, limit: int) -> None:
        """Change the number of blocks; content must move with its block."""
        used = self.manager.num_held + self.manager.num_cached
        if used > limit:
            return
        before = [[self.content.get(block) for block in table] for table in self.tables]
        copies = self.manager.set_limit(limit, self.tables)
        for source, destination in copies:
            assert destination < limit <= source
            self.content[destination] = self.content.pop(source, [])
        after = [[self.content.get(block) or None for block in table] for table in self.tables]
        assert after == [[content or None for content in table] for table in before]
        assert self.manager.num_free == limit - used

    @invariant()
    def integrity(self) -> None:
        self.manager.check_integrity(self.tables)

    @invariant()
    def nobody_writes_where_another_reads(self) -> None:
        for table, tokens in zip(self.tables, self.tokens, strict=True):
            start = len(tokens)
            if self.manager.frozen(table, start, start + 1):
                continue  # it would be copied first
            last = table[start // BLOCK :][:1]
            others = [b for t in self.tables if t is not table for b in t]
            assert not set(last) & set(others)

    def _free_up(self, count: int) -> bool:
        lacking = count - self.manager.num_free
        if lacking > self.manager.num_cached:
            return False
        self.manager.evict(max(lacking, 0))
        return True

    def _pick(self, data: st.DataObject) -> tuple[list[int], list[int]]:
        i = data.draw(st.integers(0, len(self.tables) - 1))
        return self.tables[i], self.tokens[i]

    def _hashes(self, tokens: list[int]) -> list[bytes]:
        return block_hashes(root_hash(CacheScope()), block_contents(tokens, BLOCK))


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_oldest_cached_block_is_evicted_first() -> None:
    manager = BlockManager(2, BLOCK)
    for content in (b"old", b"new"):
        table: list[int] = []
        manager.grow(table, BLOCK)
        manager.publish(table[:1], [content])
        if content == b"old":
            old = table
        else:
            manager.free(old)
            manager.free(table)
    manager.evict(1)
    assert manager.find([b"old"]) == [] and manager.find([b"new"])


def test_the_lowest_free_block_is_taken_first() -> None:
    manager = BlockManager(6, BLOCK)
    low: list[int] = []
    middle: list[int] = []
    manager.grow(low, BLOCK)
    manager.grow(middle, 3 * BLOCK)
    manager.free(low)
    low.append(middle.pop(1))
    manager.free(low)
    manager.grow(middle, 5 * BLOCK)
    assert middle == [1, 3, 0, 2, 4]


def test_taking_a_block_fails_if_none_is_free() -> None:
    manager = BlockManager(3, BLOCK)
    manager.set_limit(2, [])
    with pytest.raises(AssertionError, match="taken and 2 are free"):
        manager.grow([], 3 * BLOCK)


def test_freeing_twice_fails() -> None:
    manager = BlockManager(2, BLOCK)
    table: list[int] = []
    manager.grow(table, 1)
    twice = list(table)
    manager.free(table)
    with pytest.raises(AssertionError, match="freed twice"):
        manager.free(twice)


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_scopes_share_a_root_only_if_tenant_and_salt_are_equal(
    a: tuple[str, str], b: tuple[str, str]
) -> None:
    assert (root_hash(CacheScope(*a)) == root_hash(CacheScope(*b))) == (a == b)


def test_links_of_different_kinds_do_not_collide() -> None:
    assert root_hash(CacheScope("a", "b")) != root_hash(CacheScope("ab", ""))
    before = root_hash(CacheScope())
    one = block_hashes(before, block_contents([5], 1))
    two = block_hashes(before, block_contents([5, 97], 2))
    assert one != [adapter_hash(before, "", 5)]
    assert two != [adapter_hash(before, "a" + "\0" * 7, 5)]
