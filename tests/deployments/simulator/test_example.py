"""The example: from usage records to a config that the server takes."""

import runpy
import sys
from pathlib import Path
from random import Random

import pytest
import yaml

from deployments.config import load_config
from deployments.simulator.profile import Profile
from deployments.simulator.replica import ReplicaSize
from deployments.usage.meter import UsageMeter
from deployments.usage.record import UsageRecord
from reef.profiling import as_document

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "fleet" / "tune.py"


def write_usage(folder: Path, num_requests: int) -> None:
    """Let the server's own meter write; every tenth request is given up before it is answered."""
    rng, names = Random(0), ("acme/sql", "acme/tickets", None)
    meter = UsageMeter(folder, 2**20, None, 1.0, 60.0, num_slots=2 * num_requests)
    for i in range(num_requests):
        used = UsageRecord(
            id="", request_id=f"r{i}", time_s=1.7e9 + i / 8, tenant="acme", route="r", model="m"
        )
        used.adapter, used.version = rng.choice(names), 1
        charge = meter.begin(used)
        charge.read(rng.randint(5, 90), 0, 0, 0.0, 0.1)
        charge.sent(rng.randint(1, 30) if i % 10 else 0, 0)
        charge.end(200, {"stop"})
    meter.close()


def test_usage_records_become_a_tuned_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage, profile, out = (tmp_path / name for name in ("usage", "profile.yaml", "out.yaml"))
    write_usage(usage, 40)
    profile.write_text(yaml.safe_dump(as_document(Profile(cold_start=0.5), ReplicaSize())))
    config = ROOT / "configs" / "replicas-cpu.yaml"
    files = [str(path) for path in (SCRIPT, usage, config, profile, out)]
    options = ["--trials", "1", "--max", "3", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", [*files, *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "40 requests, of which 4 got no token" in printed and "autoscaling:" in printed
    tuned = load_config(yaml.safe_load(out.read_text())["applications"][0]["args"])
    assert (tuned.models[0].replicas.min, tuned.models[0].replicas.max) == (1, 3)
    before = yaml.safe_load(config.read_text())["applications"][0]["args"]["models"][0]
    assert tuned.models[0].id == before["id"]
