"""Lets the C library's allocator retain the pages that a step frees."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
LIMIT = 2**31 - 1


def hold_memory() -> bool:
    """Keep freed pages in this process, whatever their size; False where there is no such switch.

    Activations of some megabytes are otherwise mapped afresh in every pass and returned after it,
    and the kernel zeroes each page again. What is held is what the largest step needed; numbers
    do not change.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library, such as musl
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LIMIT))
