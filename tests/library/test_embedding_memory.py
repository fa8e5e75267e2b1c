"""Memory does not grow with the number of images."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from many_images import contents, write_folder

FEW, MANY = 1_000, 20_000
CODE = """
import resource, sys
from rotation_ssl.embedding import embed, run

# the network's own memory does not depend on the number of images; without it there is time for many
run.make_extractor = lambda model, manifest: lambda pixels: {"block1": pixels.float().mean((2, 3)).repeat(1, 64)}
print(embed(*sys.argv[1:3], "rotnet_nin", layers=["block1"], shard_size=500, workers=1, precision="fp32"))
print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def peak_memory(folder, count):
    """kB of the process that runs the network, and of the one that decodes, for so many images of 8 pixels."""
    source = write_folder(folder / f"images-{count}", contents(count, size=8))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(source), str(folder / f"out-{count}")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    summary, memory = result.stdout.splitlines() or [result.stderr, ""]
    assert f"images={count}, errors=0" in summary
    return [int(number) for number in memory.split()]


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    for few, many in zip(peak_memory(tmp_path, FEW), peak_memory(tmp_path, MANY), strict=True):
        assert many < 1.1 * few
