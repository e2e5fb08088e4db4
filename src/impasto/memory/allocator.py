"""What C libraries do with memory that tensors have freed, and with kernels for shapes that do not come again."""

from __future__ import annotations

import ctypes
import os

#: Bytes of freed memory that a process keeps; the largest block that is kept (glibc allows no more).
KEPT = 256 << 20
LARGEST_BLOCK = 32 << 20
#: Names of the two in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
#: Shapes whose kernels oneDNN keeps, and those that torch has described for it; 1024 unless set.
_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "32"}


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


def return_freed_memory() -> None:
    """Return all freed memory to the system, also that between blocks in use. It takes a few hundredths of a second."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def limit_kernel_caches() -> None:
    """Keep oneDNN's kernels of the last 64 shapes, for processes that compute with ever new shapes.

    oneDNN and torch keep 1,024 each. Those of a linear layer take a quarter of a megabyte for each number of rows, so
    the memory of an engine whose batches have all numbers of tokens grew on. A kernel is made in 1 to 3 ms.

    Environment variables that set the same are respected. It has no effect after the first use of such a kernel.
    """
    for name, value in _KERNELS.items():
        os.environ.setdefault(name, value)
