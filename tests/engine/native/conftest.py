"""Parametrizes tests by instruction sets of this machine, with one and several threads."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.backends.native import library
from engine.backends.native.build import BuildError
from engine.backends.native.library import Context, supported_isas

if "REEF_TEST_LIBRARY" in os.environ:  # a library compiled with other options
    library.ensure_library = lambda: Path(os.environ["REEF_TEST_LIBRARY"])
THREADS = [2] if "REEF_TEST_QUICK" in os.environ else [1, 2, 3]


def _isas() -> list[str]:
    """Return all but `amx`, which has avx512's kernels and some others: test_linear_amx.py and
    test_attention_amx.py test these."""
    try:
        return [isa for isa in supported_isas() if isa != "amx"]
    except BuildError:
        return []


@pytest.fixture(params=_isas() or ["none"])
def isa(request: pytest.FixtureRequest) -> str:
    if request.param == "none":
        pytest.skip("this machine has no compiler, or no instruction set that the kernels need")
    return request.param


@pytest.fixture(params=THREADS, ids="{}-threads".format)
def context(request: pytest.FixtureRequest, isa: str) -> Iterator[Context]:
    opened = Context(isa, request.param)
    yield opened
    opened.close()
