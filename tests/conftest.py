"""One thread for torch: tiny models gain nothing from two, and lose much on a busy machine.

Without a GPU, Triton kernels run in Triton's interpreter, which it decides when it is imported.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
