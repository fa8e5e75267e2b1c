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

# for the commands' --help
TURN_OFF = "On Linux glibc is told to keep large blocks, which is faster; ROTATION_SSL_MALLOPT=0 turns that off."
CONTROL_GROUP = Path("/sys/fs/cgroup")


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
    """Bytes that can be had without swapping, as Linux says, and within a container's limit; None elsewhere."""
    lines = (_read(Path("/proc/meminfo")) or "").splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    # of control groups, version 2 and version 1
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = _read(CONTROL_GROUP / limit), _read(CONTROL_GROUP / used)
        if most and now and most.strip() != "max":
            found.append(max(0, int(most) - int(now)))
    return min(found, default=None)


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None
