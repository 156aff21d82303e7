"""Totals of a deployment's engines never fall, whatever is started again or goes away."""

from hypothesis import given
from hypothesis import strategies as st

from deployments.fleet.engine_totals import TOTALS, EngineTotals
from engine.messages import EngineStats


def test_replicas_and_the_lives_of_an_engine_add_up() -> None:
    totals = EngineTotals()
    totals.report("a", EngineStats(total_steps=5, total_step_s=0.5))
    totals.report("b", EngineStats(total_steps=2))
    totals.report("a", EngineStats(total_steps=9, total_step_s=1.5))
    totals.report("a", EngineStats())  # its process died
    totals.report("a", EngineStats(total_steps=3, total_step_s=0.25))
    shown = totals.put_into(EngineStats(num_running=4, total_steps=3))
    assert shown == EngineStats(num_running=4, total_steps=14, total_step_s=1.75)


REPORTS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20)), max_size=30)


@given(REPORTS)
def test_no_total_ever_falls(reports: list[tuple[str, int]]) -> None:
    totals = EngineTotals()
    before = EngineStats()
    for replica_id, count in reports:
        totals.report(replica_id, EngineStats(**dict.fromkeys(TOTALS, count)))
        now = totals.put_into(EngineStats())
        assert all(getattr(now, name) >= getattr(before, name) for name in TOTALS)
        before = now
