"""Keep a process that handles bodies of any size from growing with each of them.

glibc raises its limit for mapping a block on its own whenever such a block is freed, and hands
smaller ones out of heaps of which only the end can be given back: after thousands of bodies of all
sizes a process holds far more than it uses. Fixed limits and few heaps prevent that, for a system
call or two with each large body. See mallopt(3).
"""

import ctypes
import logging

log = logging.getLogger(__name__)

OPTIONS = {"M_TRIM_THRESHOLD": (-1, 2**17), "M_MMAP_THRESHOLD": (-3, 2**17), "M_ARENA_MAX": (-8, 2)}


def give_memory_back() -> None:
    """Set the limits for this process. Without effect where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for name, (option, value) in OPTIONS.items():
        if not mallopt(option, value):
            log.warning("the allocator refused %s = %d", name, value)
