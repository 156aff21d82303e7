"""One thread for torch: tiny models gain nothing from two, and lose much on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
