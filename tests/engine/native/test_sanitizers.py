"""Runs the kernel tests on a library with address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.backends.native.build import compile_library
from engine.backends.native.library import supported_isas

FOLDER = Path(__file__).parent
FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TESTS = (
    "test_attention.py",
    "test_draw.py",
    "test_elementwise.py",
    "test_linear.py",
    "test_linear_fourbit.py",
    "test_linear_short.py",
    "test_lora_affine.py",
    "test_lora_kernels.py",
    "test_pool.py",
    "test_store.py",
)
AMX_TESTS = ("test_attention_amx.py", "test_linear_amx.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_pass_the_address_and_undefined_behavior_sanitizers(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ and its sanitizers")
    runtime = _output("g++", "-print-file-name=libasan.so").strip()
    if not Path(runtime).exists():
        pytest.skip("this g++ has no address sanitizer")
    library = compile_library(tmp_path, FLAGS)
    environment = {
        **os.environ,
        "REEF_TEST_LIBRARY": str(library),
        "REEF_TEST_QUICK": "1",
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    }
    tests = [str(FOLDER / name) for name in TESTS]
    if "amx" in supported_isas():
        tests += [str(FOLDER / name) for name in AMX_TESTS]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
