"""The Ray engine, in processes of its own: the same parts as one machine makes, also where actors or the driver die."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from many_images import contents, part_bytes, rows_of, write_folder, write_tar
from pyarrow import parquet

from rotation_ssl.embedding import cluster, embed

SMALL = {"model": "rotnet_nin", "shard_size": 16, "batch_size": 8, "precision": "fp32"}
PROLOGUE = """
import json, os, signal, sys, threading
from pathlib import Path
import ray
from rotation_ssl.embedding import cluster, embed

def actors():
    # processes of Ray below this one
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::Embedder"):
                found.append(int(folder.name))
        except OSError:
            pass
    def is_mine(pid):
        return pid == os.getpid() or (pid in parents and is_mine(parents[pid]))
    return sorted(filter(is_mine, found))

source, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
progressed = []
embed_on_cluster = cluster.embed_on_cluster
def watch():
    pass
def watched(*args):
    for done in embed_on_cluster(*args):
        progressed.append(done)
        watch()
        yield done
import rotation_ssl.embedding.run as run
run.embed_on_cluster = watched
"""
ONE_MACHINE = """
ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
"""
EMBED = "print(embed(source, out, engine='ray', **options))\n"
# when the second part is there, each actor that is running dies; and again at the next part
KILL_ACTORS = """
killed = []
def watch():
    if 2 <= len(progressed) < 4:
        for pid in actors():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
"""
# two machines, of which one is lost when the second part is there
LOSE_MACHINE = """
import atexit
from ray.cluster_utils import Cluster
machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
atexit.register(machines.shutdown)
lost = machines.add_node(num_cpus=1)
ray.init(address=machines.address, logging_level="ERROR", log_to_driver=False)
def watch():
    if len(progressed) == 2:
        machines.remove_node(lost, allow_graceful=False)
"""
KILL_DRIVER = """
def watch():
    if len(progressed) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def environment(home):
    """Ray is quiet, and writes what it keeps of a user into the test's own folder."""
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "HOME": str(home)}


def on_ray(code, source, out, options=SMALL, start=ONE_MACHINE):
    return subprocess.run(
        [sys.executable, "-c", PROLOGUE + start + code, str(source), str(out), json.dumps({"workers": 0, **options})],
        cwd=ROOT,
        env=environment(out.parent),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("many") / "images", contents(200, 100))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    code = (
        "import sys, json; from rotation_ssl.embedding import embed; embed(*sys.argv[1:3], **json.loads(sys.argv[3]))"
    )
    arguments = [str(images), str(folder), json.dumps({"workers": 0, **SMALL})]
    # with as many threads as the actors have
    here = environment(folder.parent)
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=here, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_the_command_with_decoding_processes(images, whole, tmp_path):
    command = [sys.executable, "-m", "rotation_ssl.cli", "features", str(images), "-o", f"{tmp_path}/out/"]
    options = ["--engine", "ray", "--workers", "1", "--shard-size", "16", "--batch-size", "8", "--precision", "fp32"]
    options += ["--model", "rotnet_nin"]
    result = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert result.returncode == 1 and "198 images in 13 parts; 2 errors" in result.stdout, result.stderr
    assert part_bytes(tmp_path / "out") == part_bytes(whole)


@pytest.mark.slow
def test_actors_that_are_killed(images, whole, tmp_path):
    told = "assert len(set(killed)) >= 2, killed\n"
    result = on_ray(KILL_ACTORS + EMBED + told, images, tmp_path / "out")
    assert result.returncode == 0, result.stdout + result.stderr
    assert part_bytes(tmp_path / "out") == part_bytes(whole)


@pytest.mark.slow
def test_a_machine_that_is_lost(images, whole, tmp_path):
    told = "assert len(progressed) == 13 and len(ray.nodes()) == 2, progressed\n"
    result = on_ray(EMBED + told, images, tmp_path / "out", start=LOSE_MACHINE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert part_bytes(tmp_path / "out") == part_bytes(whole)


@pytest.mark.slow
def test_a_driver_that_is_killed(images, whole, tmp_path):
    options = {**SMALL, "resume": True}
    result = on_ray(KILL_DRIVER + EMBED, images, tmp_path / "out", options)
    assert result.returncode == -9, result.stderr
    assert 3 <= len(list((tmp_path / "out").glob("part-*.parquet"))) < 13
    # the second time nothing is left to do
    result = on_ray(EMBED + EMBED, images, tmp_path / "out", options)
    summary = "Summary(parts=13, images=198, errors=2, not_read={})"
    assert result.stdout.count(summary) == 2, result.stdout + result.stderr
    assert part_bytes(tmp_path / "out") == part_bytes(whole)


@pytest.mark.slow
def test_errors_of_actors_are_one_line(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", contents(10))
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:3000])
    code = (
        "import rotation_ssl.cli, rotation_ssl.embedding.sources as sources\n"
        "sources.Path.is_file = lambda path: True\n"
        "options = [f'--{k}={v}' for k, v in options.items() if k in ('workers', 'precision')]\n"
        "sys.exit(rotation_ssl.cli.main(['features', source, '-o', out, '--engine=ray', *options]))\n"
    )
    # one actor takes the shards in their order; of two, one may be at the third while the other is at the first
    alone = ONE_MACHINE.replace("num_cpus=2", "num_cpus=1")
    result = on_ray(code, f"{tmp_path}/{{0..2}}.tar", tmp_path / "out", start=alone)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(lines) == 1 and "2.tar" in lines[0], result.stderr
    errors = parquet.read_table(tmp_path / "out" / "errors" / "part-00001.parquet")["path"].to_pylist()
    assert errors == ["1.tar"] and len(rows_of(tmp_path / "out")) > 10


def test_room_for_actors():
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 3.0}}, {"Alive": True, "Resources": {"CPU": 4.0}}]
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0}})
    assert cluster._count_actors(nodes, {"num_cpus": 3}) == 3
    assert cluster._count_actors(nodes, {"num_cpus": 1, "num_gpus": 1}) == 3
    assert cluster._count_actors(nodes, {"num_cpus": 4, "num_gpus": 1}) == 2
    with pytest.raises(ValueError, match=r"no machine of the cluster has 16 CPUs.*fewer --workers"):
        cluster._count_actors(nodes, {"num_cpus": 16})


@pytest.mark.slow
def test_a_cluster_that_cannot_be_reached(images, tmp_path):
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        with pytest.raises(OSError, match=rf"the Ray cluster {address} cannot be reached \(.*refused\)"):
            embed(images, tmp_path / "out", engine="ray", address=address, **SMALL)


@pytest.mark.slow
def test_other_weights_are_refused(images, whole, tmp_path):
    manifest = json.loads((whole / "manifest.json").read_text())
    manifest["weights_sha256"] = "0" * 64
    with pytest.raises(ValueError, match=r"rotnet_nin has other weights on .* than where the command runs"):
        _ = cluster.Embedder(tmp_path, cluster.Manifest(**manifest), "rotnet_nin", "cpu", 0, 1).extract
