"""Memory: glibc's allocator told to keep large blocks, and how much is left.

The first is the one process setting that the training commands change.

As it stands glibc maps every large activation anew and gives it back at once, so each step faults in gigabytes of fresh
pages. Importing ``rotation_ssl`` never does this; set ``ROTATION_SSL_MALLOPT=0`` to keep the training commands from it.
"""

import ctypes
import os
import sys
from pathlib import Path

# parameters of mallopt(3), from malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_large_blocks() -> bool:
    """Serve large blocks from the heap and never trim it (Linux with glibc alone); whether it was done."""
    if not sys.platform.startswith("linux") or os.environ.get("ROTATION_SSL_MALLOPT") == "0":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 512 * 2**20))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])


def available_memory() -> int | None:
    """Bytes that can be had without swapping, as Linux says; None elsewhere."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
