"""How wide a kernel that holds a whole row is, and how many threads hold it."""

import triton

MAX_WIDTH = 65536  # values of a row that one program can hold; beyond 32768 some are spilt


def block_of(width: int) -> int:
    """The power of two that holds a row. Raises ValueError for one that is too wide."""
    if width > MAX_WIDTH:
        raise ValueError(f"a row of {width} values; at most {MAX_WIDTH} fit one program")
    return triton.next_power_of_2(width)


def warps_of(block: int) -> int:
    """16 values a thread, two 16-byte loads in two-byte types; more where rows are very wide."""
    return min(max(block // 512, 1), 32)
