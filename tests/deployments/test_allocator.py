import subprocess
import sys

import pytest

PROGRAM = """
import sys
import psutil
from deployments.allocator import give_memory_back
if sys.argv[1] == "set":
    give_memory_back()
large = bytearray(24 << 20)
del large  # from here on glibc would not map blocks of less than this
blocks = [bytearray(1 << 20) for _ in range(64)]
last = bytearray(1000)  # lies behind them
before = psutil.Process().memory_info().rss
blocks.clear()
print((before - psutil.Process().memory_info().rss) >> 20)
"""


def mib_given_back(mode: str) -> int:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
    )
    return int(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_blocks_are_given_back_though_something_lies_behind_them() -> None:
    assert mib_given_back("set") >= 60
