"""The machine and what is installed on it: memory, processor or GPU, versions."""

import ctypes
import os
import platform
import sys
from pathlib import Path

import PIL
import timm
import torch

import rotation_ssl
from rotation_ssl.messages import first_line

# parameters of mallopt(3), from malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4

# the end of --help of the commands that call keep_large_blocks
MALLOPT_HELP = (
    "On Linux this command makes glibc keep large memory blocks, for speed; ROTATION_SSL_MALLOPT=0 disables this."
)
CONTROL_GROUP = Path("/sys/fs/cgroup")


def keep_large_blocks() -> bool:
    """Make glibc serve large blocks from the heap and never trim it (Linux only); returns whether it was done.

    Otherwise glibc maps and unmaps every large activation, and each step faults in gigabytes of fresh pages. It is the
    only setting of the process that the training commands change. Importing ``rotation_ssl`` never changes it, and
    ``ROTATION_SSL_MALLOPT=0`` disables it.
    """
    if not sys.platform.startswith("linux") or os.environ.get("ROTATION_SSL_MALLOPT") == "0":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 512 * 2**20))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])


def release_free_memory() -> bool:
    """Make glibc return free memory to the system (malloc_trim(3)); returns whether there is such a function.

    Blocks kept by :func:`keep_large_blocks` are faulted in again when they are used: call it seldom.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if malloc_trim is None:
        return False
    malloc_trim(0)
    return True


def available_memory() -> int | None:
    """Bytes available without swapping, as Linux says, and within a container's limit; None on other systems."""
    lines = (_read(Path("/proc/meminfo")) or "").splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    # of control groups, version 2 and version 1
    for limit, used, details in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        most, now = _read(CONTROL_GROUP / limit), _read(CONTROL_GROUP / used)
        if most and now and most.strip() != "max":
            found.append(max(0, int(most) - int(now) + _cached_files(CONTROL_GROUP / details)))
    return min(found, default=None)


def check_memory(needed: int, what: str, advice: str) -> None:
    """Refuse what needs more bytes of memory than are available.

    Raises:
        ValueError: they are not available; the message begins with ``what``, a plural, and ends with ``advice``.
    """
    available = available_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"{what} need {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} are available: {advice}"
        )


def _cached_files(details: Path) -> int:
    """Bytes of cached files, which a control group counts as used, and which go when memory is asked for."""
    numbers = dict(line.split(maxsplit=1) for line in (_read(details) or "").splitlines())
    # version 1 counts the groups within it in numbers of their own
    return sum(int(numbers.get(f"total_{kind}", numbers.get(kind, 0))) for kind in ("active_file", "inactive_file"))


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device | str) -> str:
    """The GPU, or the processor as /proc/cpuinfo names it, or the platform's word where there is none."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def check_device(device: str) -> None:
    """Check that tensors can be created on a device and read back.

    Raises:
        ValueError: they cannot; the error says why.
    """
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {device!r} cannot be used ({first_line(error)}); give another") from error


def library_versions() -> dict[str, str]:
    """Versions of what decides a number."""
    return {
        "rotation_ssl": rotation_ssl.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None
