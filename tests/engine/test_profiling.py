"""Measuring an engine: steps of all kinds are seen, and become a profile."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from deployments.simulator.config import read_simulation
from engine.config import EngineConfig
from engine.profiling.measure import measure, num_phases
from reef.commands import reef
from reef.profiling import as_document, fit, size_of
from tests.engine.support.tiny import write_tiny


def test_steps_with_and_without_prompts_and_adapters_are_measured(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model").folder
    config = EngineConfig(str(model), device="cpu", max_num_seqs=3, memory_bytes=2**24)
    phases: list[int] = []
    measured = measure(config, tmp_path / "new", seconds=1.0, num_adapters=2, watch=phases.append)
    assert sum(phases) == num_phases(config) == 11
    steps = measured.steps
    assert {s.shape.tokens for s in steps} > {1, 2, 3} and any(s.shape.pairs for s in steps)
    assert {s.distinct_adapters for s in steps} >= {0, 1, 2}
    assert {s.after_idle for s in steps} == {0, 1} and any(s.new_requests for s in steps)
    with_adapters = [s for s in steps if s.adapter_rows]
    assert all(s.adapter_row_bytes >= s.distinct_bytes > 0 for s in with_adapters)
    small, large = {read.nbytes for read in measured.reads}
    assert large > 4 * small and measured.engine.max_num_seqs == 3
    profile, fitted = fit(measured, [])
    assert 0 < profile.cold_start < 60 and fitted.median_error < 1
    document = as_document(profile, size_of(measured.engine))
    assert document["fleet"]["size"]["block_bytes"] == measured.engine.block_bytes
    assert document["profile"]["step"]["tokens"][0][1] > 0


@pytest.mark.slow
def test_the_command_writes_what_a_simulation_reads(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model").folder
    section = {"id": "tiny", "source": str(model), "engine": {"device": "cpu", "max_num_seqs": 2}}
    store = {"root": f"file://{tmp_path / 'store'}", "disk_path": str(tmp_path / "disk")}
    application = {
        "name": "reef",
        "import_path": "deployments.app:build_app",
        "args": {"models": [section], "adapters": store},
    }
    config, out = tmp_path / "config.yaml", tmp_path / "profile.yaml"
    config.write_text(yaml.safe_dump({"applications": [application]}))
    ran = CliRunner().invoke(reef, ["profile", str(config), "--seconds", "5", "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    text = out.read_text()
    assert "the config's store holds no adapter" in text
    out.write_text(text + "workload: {prompt: {most: 100}, output: {most: 50}}\n")
    assert read_simulation(out).fleet.size.max_num_seqs == 2
    wrong = CliRunner().invoke(reef, ["profile", str(config), "--model", "large"])
    assert wrong.exit_code == 1 and "it has tiny" in wrong.output
