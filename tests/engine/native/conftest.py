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


def _isas() -> tuple[str, ...]:
    try:
        return supported_isas()
    except BuildError:
        return ()


ISAS = _isas()


# All but `amx`, which has avx512's kernels and some others: test_linear_amx.py and
# test_attention_amx.py test these.
@pytest.fixture(params=[isa for isa in ISAS if isa != "amx"] or ["none"])
def isa(request: pytest.FixtureRequest) -> str:
    if request.param == "none":
        pytest.skip("this machine has no compiler, or no instruction set that the kernels need")
    return request.param


@pytest.fixture(params=THREADS, ids="{}-threads".format)
def context(request: pytest.FixtureRequest, isa: str) -> Iterator[Context]:
    opened = Context(isa, request.param)
    yield opened
    opened.close()


def _need_amx() -> None:
    if "amx" not in ISAS:
        pytest.skip("this machine has no AMX, or no compiler")


@pytest.fixture(params=[1, 3], ids="{}-threads".format)
def amx(request: pytest.FixtureRequest) -> Iterator[Context]:
    _need_amx()
    opened = Context("amx", request.param)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def vectors() -> Iterator[Context]:
    """Kernels that AMX is compared with."""
    _need_amx()
    opened = Context("avx512", 2)
    yield opened
    opened.close()
