"""Memory of the process: what glibc keeps for speed, and gives back when told."""

import platform
import subprocess
import sys

import pytest

MEASURE = """
import os
import torch
from rotation_ssl.machine import keep_large_blocks, release_free_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20

assert keep_large_blocks()
large = torch.ones(2**26)
small = torch.ones(2**10)  # above it, so that the heap does not end with the large block
full = resident()
del large
kept = resident()
assert release_free_memory()
print(full, kept, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_kept_memory_is_given_back_below_a_block_in_use():
    command = [sys.executable, "-c", MEASURE]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    full, kept, released = map(int, out.split())
    assert full - kept < 20  # MiB
    assert 230 < kept - released < 280
