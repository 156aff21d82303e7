"""The native library at every instruction set of this machine, with one thread and with several."""

from collections.abc import Iterator

import pytest

from engine.kernels.cpu.build import BuildError
from engine.kernels.cpu.library import Context, supported_isas


def _isas() -> tuple[str, ...]:
    try:
        return supported_isas()
    except BuildError:
        return ()


@pytest.fixture(params=_isas() or ["none"])
def isa(request: pytest.FixtureRequest) -> str:
    if request.param == "none":
        pytest.skip("this machine has no compiler, or no instruction set that the kernels need")
    return request.param


@pytest.fixture(params=[1, 2, 3], ids=["1-thread", "2-threads", "3-threads"])
def context(request: pytest.FixtureRequest, isa: str) -> Iterator[Context]:
    opened = Context(isa, request.param)
    yield opened
    opened.close()
