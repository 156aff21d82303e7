"""Tests that every kernel compiles for sm_80 and sm_90 without spills, within their limits.

Large data must be loaded with wide instructions.
"""

import pytest

from tests.engine.cuda.aot import (
    ARCHITECTURES,
    MAX_REGISTERS,
    MAX_SHARED_BYTES,
    Compiled,
    all_cases,
    run_all,
)

CASES = {case.name: case for case in all_cases()}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], Compiled]:
    return {(c.name, c.architecture): c for c in run_all()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_compile_without_spills_and_within_their_limits(
    compiled: dict[tuple[str, int], Compiled], name: str, architecture: int
) -> None:
    case, figures = CASES[name], compiled[name, architecture]
    assert figures.stack_bytes == 0, "spills or run-time indexed arrays"
    assert figures.registers <= case.max_registers
    assert figures.registers * 32 * case.num_warps <= MAX_REGISTERS
    assert figures.shared_bytes <= MAX_SHARED_BYTES[architecture]
    assert case.allow_scalar_loads or figures.scalar_loads == 0
    assert not figures.missing
