"""The example: from a log of answers to a config that the server takes."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import yaml

from deployments.config import load_config
from deployments.simulator.profile import Profile
from deployments.simulator.replica import ReplicaSize
from reef.profiling import as_document

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "fleet" / "tune.py"


@pytest.mark.slow
def test_a_log_of_answers_becomes_a_tuned_config(tmp_path: Path) -> None:
    rng, names = Random(0), ("demo", "sql", "tickets")
    answers = [
        {
            "id": f"chatcmpl-{i}",
            "created": 1_700_000_000 + rng.randrange(8),
            "model": rng.choice(names),
            "usage": {"prompt_tokens": rng.randint(5, 90), "completion_tokens": rng.randint(1, 30)},
        }
        for i in range(60)
    ]
    log, profile, out = (tmp_path / name for name in ("log", "profile.yaml", "out.yaml"))
    log.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    profile.write_text(yaml.safe_dump(as_document(Profile(cold_start=0.5), ReplicaSize())))
    config = ROOT / "configs" / "replicas-cpu.yaml"
    command = [sys.executable, str(SCRIPT), str(log), str(config), str(profile), str(out)]
    ran = subprocess.run(
        [*command, "--trials", "1", "--max", "3"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "autoscaling:" in ran.stdout, ran.stderr
    tuned = load_config(yaml.safe_load(out.read_text())["applications"][0]["args"])
    assert (tuned.models[0].replicas.min, tuned.models[0].replicas.max) == (1, 3)
    before = yaml.safe_load(config.read_text())["applications"][0]["args"]["models"][0]
    assert tuned.models[0].id == before["id"]
