"""What is spent of budgets outlives the ledger."""

import asyncio
from pathlib import Path

import pytest

from adapter_store.file_store import FileStore
from deployments.fleet.budget_keeper import KEY, BudgetKeeper
from deployments.policy.admission import Limits
from deployments.policy.bucket import Spent
from deployments.policy.leases import Leases, Need
from deployments.policy.ledger import Ledger

WALL_S = 1_900_000_000.0


def spend(ledger: Ledger, num: int) -> None:
    leases, limits, need = Leases("i"), Limits(tokens_per_day=1000), Need(tokens=num)
    assert leases.take("a", limits, need, 0, WALL_S) is None
    leases.want("a", need)
    message = leases.message(0, WALL_S, False)
    assert message is not None
    ledger.take(message, 0, WALL_S)


def test_a_new_ledger_knows_what_the_last_one_granted(tmp_path: Path) -> None:
    async def run() -> None:
        store, old = FileStore(tmp_path), Ledger("old", 0, 0)
        keeper = BudgetKeeper(store, old, wall_s=lambda: WALL_S)
        await keeper.look()
        assert store.size(KEY) is None, "nothing is spent"
        spend(old, 300)
        await keeper.look()
        new = Ledger("new", 0, 0)
        spend(new, 10)  # before it has read what the last one wrote
        await BudgetKeeper(store, new, wall_s=lambda: WALL_S).look()
        assert new.all_spent(WALL_S)["a"] == Spent(int(WALL_S // 86400), 300, 300)

    asyncio.run(run())


@pytest.mark.parametrize("raw", [b"{", b"[]", b'{"format": 2, "spent": {}}', b'{"format": 1}'])
def test_a_damaged_record_is_logged_and_written_anew(
    tmp_path: Path, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        store, ledger = FileStore(tmp_path), Ledger("l", 0, 0)
        store.put(KEY, raw)
        spend(ledger, 5)
        await BudgetKeeper(store, ledger, wall_s=lambda: WALL_S).look()
        assert b'"a"' in store.get(KEY)

    asyncio.run(run())
    assert "damaged" in caplog.text


def test_a_store_that_may_only_be_read_is_only_read(tmp_path: Path) -> None:
    async def run() -> None:
        store, ledger = FileStore(tmp_path), Ledger("l", 0, 0)
        spend(ledger, 5)
        await BudgetKeeper(store, ledger, may_write=False, wall_s=lambda: WALL_S).look()
        assert store.size(KEY) is None

    asyncio.run(run())
