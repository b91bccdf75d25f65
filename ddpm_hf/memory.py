"""Freed memory is kept for the next step instead of being given back to the system (CPU, Linux with glibc)."""

import ctypes
import platform

# parameters of mallopt(3)
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, from now on; whether that could be done.

    glibc gives big blocks back when they are freed, so that every step faults in all of its activations again, page by
    page: up to a third of a training step's time. Kept, the process holds on to its peak until it ends.
    Other systems and allocators are left as they are.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1))
