"""Measuring an engine: steps of all kinds are seen, and become a profile."""

from pathlib import Path

from engine.config import EngineConfig
from engine.profiling.measure import measure, num_phases
from reef.profiling import as_document, fit, size_of
from tests.engine.support.tiny import write_tiny


def test_steps_with_and_without_prompts_and_adapters_are_measured(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model").folder
    config = EngineConfig(str(model), device="cpu", max_num_seqs=3, memory_bytes=2**24)
    phases: list[int] = []
    measured = measure(config, tmp_path / "new", seconds=1.0, num_adapters=2, watch=phases.append)
    assert sum(phases) == num_phases(config) == 10
    steps = measured.steps
    assert {s.shape.tokens for s in steps} > {1, 2, 3} and any(s.shape.pairs for s in steps)
    assert {s.distinct_adapters for s in steps} >= {0, 1, 2}
    with_adapters = [s for s in steps if s.adapter_rows]
    assert all(s.adapter_row_bytes >= s.distinct_bytes > 0 for s in with_adapters)
    small, large = {read.nbytes for read in measured.reads}
    assert large > 4 * small and measured.engine.max_num_seqs == 3
    profile, fitted = fit(measured, [])
    assert 0 < profile.cold_start < 60 and fitted.median_error < 1
    document = as_document(profile, size_of(measured.engine))
    assert document["fleet"]["size"]["block_bytes"] == measured.engine.block_bytes
    assert document["profile"]["step"]["tokens"][0][1] > 0
