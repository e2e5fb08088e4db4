"""What the C library does with memory that tensors have freed."""

from __future__ import annotations

import ctypes
import os

#: Bytes of freed memory that a process keeps; the largest block that is kept (glibc allows no more).
KEPT = 256 << 20
LARGEST_BLOCK = 32 << 20
#: Names of the two in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Keep up to 256 MB that tensors on the CPU have freed for the next ones, instead of returning it to the system.

    glibc returns what is free at the end of its heap as soon as that is more than twice the largest block that was
    freed. The next step gets the same pages again, one page fault each: up to a tenth of its time.
    Blocks of more than 32 MB are returned in any case.

    It changes the whole process, so it is for processes that are ours and have no memory budget. Environment variables
    that set the same are respected.

    Returns:
        whether it was done: not with another C library than glibc.
    """
    if any(name in os.environ for name in _USERS):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is None:
        return False
    return bool(set_option(_M_MMAP_THRESHOLD, LARGEST_BLOCK) and set_option(_M_TRIM_THRESHOLD, KEPT))
