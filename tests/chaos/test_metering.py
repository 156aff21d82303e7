"""A short run of the program that kills metering processes; the long one is for `make chaos`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.metering import judge, run

ROOT = Path(__file__).parents[2]


def test_sums_are_what_clients_saw_whoever_is_killed(tmp_path: Path) -> None:
    seen = run(tmp_path, num_records=3000, num_kills=3, num_workers=2, seed=1)
    ended, killed = judge(tmp_path, seen)
    assert ended >= 3000 and killed


def test_the_judge_notices_a_request_that_has_no_record(tmp_path: Path) -> None:
    seen = run(tmp_path, num_records=10, num_kills=0, num_workers=1, seed=1)
    seen.take(b"\xff" * 7 + b"\0" + b"\1\0\0\0" + b"\1\0\0\0")
    with pytest.raises(AssertionError, match="have no record"):
        judge(tmp_path, seen)


@pytest.mark.slow
def test_a_longer_run_as_a_program() -> None:
    command = [sys.executable, "-m", "tests.chaos.metering", "--records", "100000", "--kills", "40"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
