"""Runs that are stopped, killed, damaged, full or diverging: what is left of them, and that it goes on exactly."""

import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_runs import SHORT, TINY, interrupt, run_killed, same, sample_images, weights

from rotation_ssl import zoo
from rotation_ssl.pretraining import loop, outputs
from rotation_ssl.pretraining.images import open_images, stream
from rotation_ssl.pretraining.loop import pretrain
from rotation_ssl.pretraining.recipe import AdamW, Sgd, Stage
from rotation_ssl.pretraining.setup import create_accelerator
from rotation_ssl.pretraining.state import HASHES, PROGRESS, Progress, find_checkpoint, read_progress, write_hashes


@pytest.fixture(scope="module")
def images():
    return sample_images()


@pytest.mark.parametrize(
    "recipe",
    [
        TINY,
        dataclasses.replace(TINY, optimizer=Sgd(), average=0.9),
        # drops paths at random: the random state is part of the checkpoint
        dataclasses.replace(
            TINY, model="test_vit", optimizer=AdamW(), image_size=16, stages=(Stage(30, 16),), padding=0
        ),
    ],
    ids=["muon", "sgd and averaged", "adamw"],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_saves_and_resumes_exactly(images, tmp_path, monkeypatch, recipe, number):
    pretrain(recipe, images, tmp_path / "whole")
    interrupt(monkeypatch, 14, lambda: signal.raise_signal(number))
    checkpoint = pretrain(recipe, images, tmp_path / "parts")
    monkeypatch.undo()
    assert checkpoint == tmp_path / "parts" / "checkpoints" / "step-000014"
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    pretrain(recipe, images, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = (json.loads((tmp_path / name / "run.json").read_text())["curve"] for name in ("whole", "parts"))
    assert [(p["step"], p["loss"]) for p in whole] == [(p["step"], p["loss"]) for p in parts]
    assert not (tmp_path / "parts" / "checkpoints").exists()


FORKED = pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info >= (3, 14), reason="workers are forked on Linux up to Python 3.13"
)


@FORKED
def test_a_stop_of_the_whole_job_leaves_the_workers_alive(small_cifar10, tmp_path, monkeypatch):
    """Slurm and systemd send SIGTERM to every process of a job."""
    photos, ended, before = small_cifar10 / "train", [], multiprocessing.active_children()

    def stop_all():
        ended.extend(worker for worker in multiprocessing.active_children() if worker not in before)
        # from another process: the workers heed their parent's
        subprocess.run(["kill", "-TERM", str(os.getpid()), *(str(worker.pid) for worker in ended)], check=True)

    interrupt(monkeypatch, 3, stop_all)
    checkpoint = pretrain(SHORT, open_images("folder", photos, 16), tmp_path / "parts", workers=2)
    monkeypatch.undo()
    assert checkpoint == tmp_path / "parts" / "checkpoints" / "step-000003"
    assert [worker.exitcode for worker in ended] == [0, 0]
    pretrain(SHORT, open_images("folder", photos, 16), tmp_path / "parts", resume=True)
    pretrain(SHORT, open_images("folder", photos, 16), tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@FORKED
def test_a_worker_ends_at_the_sigterm_of_its_run(small_cifar10):
    before = multiprocessing.active_children()
    batches = stream(open_images("folder", small_cifar10 / "train", 16), torch.arange(40).split(4), 1)
    next(batches)
    (worker,) = (worker for worker in multiprocessing.active_children() if worker not in before)
    worker.terminate()
    worker.join(timeout=60)
    assert worker.exitcode == 0
    batches.close()


def test_it_trains_in_another_thread_where_no_signal_is_heard(images, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        threads.submit(pretrain, SHORT, images, tmp_path / "thread").result()
    pretrain(SHORT, images, tmp_path / "main")
    assert same(weights(tmp_path / "thread"), weights(tmp_path / "main"))


@pytest.mark.parametrize("change", [{"holdout": 8}, {"average": 0.9}])
def test_a_run_that_is_interrupted_after_its_last_step_is_not_lost(images, tmp_path, monkeypatch, change):
    recipe = dataclasses.replace(SHORT, **change)
    pretrain(recipe, images, tmp_path / "whole")
    for slow in ("holdout_accuracy", "update_statistics"):
        monkeypatch.setattr(loop, slow, lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, images, tmp_path / "parts")
    monkeypatch.undo()
    assert find_checkpoint(tmp_path / "parts").name == "step-000006"
    pretrain(recipe, images, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert not (tmp_path / "parts" / "checkpoints").exists()


def test_what_the_monitor_saw_outlives_a_kill_during_a_resume(images, tmp_path, monkeypatch):
    interrupt(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    pretrain(SHORT, images, tmp_path, monitor=lambda network: {"seen": 1}, monitor_every=1)
    monkeypatch.undo()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert before.count(b"seen") == 3
    # whatever comes after them, the lines are there as soon as the run is taken up again
    outputs.Metrics(tmp_path, Progress({}, "", step=3), create_accelerator(SHORT, cpu=True))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


KILLS = """
    import dataclasses, itertools, os, signal, sys, traceback
    from pathlib import Path
    import torch
    sys.path[:0] = [{tests!r}, {root!r}]
    # before the first operation: a process that has threads cannot be forked
    torch.set_num_threads(1)
    from tiny_runs import TINY, sample_images, same, weights
    from rotation_ssl.pretraining.state import find_checkpoint
    from training.pretrain import pretrain
    from training.recipes import Stage

    output = Path({output!r})
    recipe = dataclasses.replace(TINY, stages=(Stage(3, 8), Stage(3, 12)), average=0.9)
    images = sample_images()

    def begun(folder):
        return find_checkpoint(folder) is not None or (folder / "model.safetensors").exists()

    def run(folder, killed_at=None, seconds=0.0):
        # a child that writes a checkpoint at every step, killed as it does its n-th thing to files, or after so many
        # seconds, wherever it is then: libraries open files without Python's knowing; its status
        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)[1]
        numbers = itertools.count(1)

        def count(event, args):
            if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
                event == "open" and str(args[0]).startswith(str(folder))
            ):
                number = next(numbers)
                if number == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if folder.name == "whole":
                    (output / "count").write_text(str(number)) if event != "open" else None

        try:
            sys.addaudithook(count)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            pretrain(recipe, images, folder, resume=begun(folder), checkpoint_seconds=0.0)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    assert run(output / "whole") == 0
    events = int((output / "count").read_text())
    assert events > 50, events
    resumed = 0
    kills = [(killed_at, 0.0) for killed_at in range(1, events, events // {kills})]
    for killed_at, seconds in kills + [(None, 0.2), (None, 0.3), (None, 0.5)]:
        folder = output / f"{{killed_at}}-{{seconds}}"
        assert run(folder, killed_at, seconds) in ((signal.SIGKILL,) if killed_at else (signal.SIGALRM, 0))
        resumed += find_checkpoint(folder) is not None
        assert run(folder) == 0, (killed_at, seconds)
        assert same(weights(output / "whole"), weights(folder)), (killed_at, seconds)
        assert not (folder / "checkpoints").exists(), (killed_at, seconds)
    print(resumed)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_checkpoint_that_goes_on_exactly(tmp_path):
    code = textwrap.dedent(KILLS).format(tests=str(ROOT / "tests"), root=str(ROOT), output=str(tmp_path), kills=8)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= 5, "most kills fall after the first checkpoint"


@pytest.fixture
def stopped(images, tmp_path, monkeypatch):
    """A run stopped at step 11."""
    interrupt(monkeypatch, 11, lambda: signal.raise_signal(signal.SIGTERM))
    pretrain(TINY, images, tmp_path / "stopped")
    monkeypatch.undo()
    return tmp_path / "stopped"


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_checkpoint_of_another_run_is_refused_and_kept(images, stopped):
    before = contents(stopped)
    with pytest.raises(ValueError, match="number of images 40 -> 39"):
        pretrain(TINY, images[:39], stopped, resume=True)
    other = dataclasses.replace(TINY, images_per_step=8, optimizer=Sgd())
    with pytest.raises(ValueError, match=r"another run \(optimizer Muon\(.*\) -> Sgd\(.*images_per_step 4 -> 8"):
        pretrain(other, images, stopped, resume=True)
    with pytest.raises(ValueError, match="parts of a step 1 -> 2"):
        pretrain(TINY, images, stopped, create_accelerator(TINY, True, accumulate=2), resume=True)
    with pytest.raises(ValueError, match="already contains a run: --resume"):
        pretrain(TINY, images, stopped)
    assert contents(stopped) == before


def test_a_checkpoint_of_another_number_of_processes_is_refused(images, stopped):
    file = find_checkpoint(stopped) / "progress.json"
    progress = json.loads(file.read_text())
    assert progress["identity"]["processes"] == "1"
    progress["identity"]["processes"] = "2"
    file.write_text(json.dumps(progress))
    write_hashes(file.parent)
    with pytest.raises(ValueError, match=r"another run \(processes 2 -> 1\)"):
        pretrain(TINY, images, stopped, resume=True)


@pytest.mark.parametrize(
    "name", ["progress.json", "model.safetensors", "optimizer.bin", "optimizer_1.bin", "random_states_0.pkl", HASHES]
)
def test_a_corrupt_checkpoint_is_refused(images, stopped, name):
    file = find_checkpoint(stopped) / name
    whole = file.read_bytes()
    flipped = bytes([*whole[:-9], whole[-9] ^ 1, *whole[-8:]])
    for content in (flipped, whole[: len(whole) // 2], whole + b"\n", b"", b"some text", None):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        before = contents(stopped)
        with pytest.raises(ValueError, match=rf"step-000011 is not a checkpoint .*\({name} ") as caught:
            pretrain(TINY, images, stopped, resume=True)
        assert str(caught.value).endswith("remove it, then start without --resume: there is no earlier one")
        assert "\n" not in str(caught.value)
        assert contents(stopped) == before


@pytest.fixture(scope="module")
def averaged(images, tmp_path_factory):
    """The last checkpoint, its progress and its files' contents, of a run that averages its weights."""
    output = tmp_path_factory.mktemp("averaged")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        folder = pretrain(dataclasses.replace(TINY, average=0.9), images, output)
    identity = json.loads((folder / "progress.json").read_text())["identity"]
    return folder, read_progress(folder, identity), {file.name: file.read_bytes() for file in folder.iterdir()}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found_and_its_file_named(averaged, data):
    folder, progress, whole = averaged
    assert len(whole) == 7
    name = data.draw(st.sampled_from(sorted(whole)))
    changed = bytearray(whole[name])
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(changed)
    try:
        with pytest.raises(ValueError, match=rf"\({name} is corrupt"):
            read_progress(folder, progress.identity)
    finally:
        (folder / name).write_bytes(whole[name])
    assert read_progress(folder, progress.identity) == progress


def test_the_hashes_are_those_of_sha256sum(stopped):
    folder = find_checkpoint(stopped)
    subprocess.run(["sha256sum", "--check", "--strict", HASHES], cwd=folder, check=True, capture_output=True)


def test_the_checkpoint_before_a_corrupt_one_goes_on_exactly(images, tmp_path, monkeypatch):
    """Two are kept; the error offers the earlier one, and what it says works."""
    interrupt(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM))
    last = pretrain(SHORT, images, tmp_path / "parts", checkpoint_seconds=0.0)
    monkeypatch.undo()
    earlier = last.with_name("step-000003")
    assert sorted(last.parent.iterdir()) == [earlier, last]
    (last / "optimizer.bin").write_bytes((earlier / "optimizer.bin").read_bytes())
    with pytest.raises(ValueError) as caught:
        pretrain(SHORT, images, tmp_path / "parts", resume=True)
    assert str(caught.value) == (
        f"{last} is not a checkpoint that can be resumed (optimizer.bin is corrupt: its sha256 is not the one in "
        f"SHA256SUMS); remove it, then --resume to go on from {earlier}"
    )
    shutil.rmtree(last)
    pretrain(SHORT, images, tmp_path / "parts", resume=True)
    pretrain(SHORT, images, tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


# --- the images are those that the run began with


def test_other_images_are_refused(images, stopped):
    changed = images.clone()
    changed[7, 1, 3, 5] ^= 1
    message = r"another run \(the images changed: pixels with sha256 [0-9a-f]{64} -> pixels with sha256 [0-9a-f]{64}\)"
    for other in (255 - images, changed, images.flip(0)):
        with pytest.raises(ValueError, match=message):
            pretrain(TINY, other, stopped, resume=True)
    pretrain(TINY, images.clone(), stopped, resume=True)
    recorded = json.loads((stopped / "run.json").read_text())["images"]
    assert recorded.startswith("pixels with sha256 ")
    with pytest.raises(ValueError, match=f"finished run of other images \\({recorded} -> pixels with sha256"):
        pretrain(TINY, changed, stopped, resume=True)
    assert pretrain(TINY, images, stopped, resume=True) == stopped / "model.safetensors"


def test_a_folder_of_images_goes_on_streamed_or_in_memory_but_not_changed(small_cifar10, tmp_path, monkeypatch):
    photos = small_cifar10 / "train"
    held = open_images("folder", photos, 16)
    held.read_all()
    interrupt(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM))
    pretrain(SHORT, held, tmp_path / "parts")
    monkeypatch.undo()
    file = sorted(photos.rglob("*.png"))[3]
    content, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(content[:-1])
    os.utime(file, ns=times)
    with pytest.raises(ValueError, match=r"the images changed: 40 files whose names, sizes and times have sha256 "):
        pretrain(SHORT, open_images("folder", photos, 16), tmp_path / "parts", resume=True)
    file.write_bytes(content)
    os.utime(file, ns=times)
    # another place, with the same times
    shutil.copytree(photos, tmp_path / "copied")
    pretrain(SHORT, open_images("folder", tmp_path / "copied", 16), tmp_path / "parts", resume=True)
    pretrain(SHORT, held, tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_hostile_checkpoint_runs_nothing(images, stopped, tmp_path):
    import pickle

    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    for name in ("optimizer.bin", "random_states_0.pkl"):
        file = find_checkpoint(stopped) / name
        whole = file.read_bytes()
        file.write_bytes(pickle.dumps(Hostile(), protocol=2))
        write_hashes(file.parent)
        with pytest.raises(ValueError, match="is not a checkpoint"):
            pretrain(TINY, images, stopped, resume=True)
        file.write_bytes(whole)
    assert not (tmp_path / "owned").exists()


# --- one training at a time


def test_a_second_training_is_told_of_the_first(images, tmp_path, monkeypatch):
    def second():
        for resume in (False, True):
            with pytest.raises(ValueError, match=rf"^another training is writing to {tmp_path}/run: wait for it, or"):
                pretrain(SHORT, images, tmp_path / "run", resume=resume)

    interrupt(monkeypatch, 3, second)
    pretrain(SHORT, images, tmp_path / "run", checkpoint_seconds=0.0)
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_a_killed_training_leaves_no_lock(small_cifar10, tmp_path):
    result = run_killed(small_cifar10, tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (tmp_path / ".lock").exists()
    pretrain(SHORT, open_images("folder", small_cifar10, 16), tmp_path, resume=True)
    assert not (tmp_path / ".lock").exists()


def test_an_output_that_cannot_be_written_is_named(images, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=rf"^output folder {output} cannot be written \("):
            pretrain(TINY, images, output)


def test_a_refused_training_makes_no_folder(images, tmp_path):
    with pytest.raises(ValueError, match="cannot be made"):
        pretrain(dataclasses.replace(TINY, model="resnet_of_nobody"), images, tmp_path / "new")
    assert not (tmp_path / "new").exists()


FULL = """
    import resource, sys
    from pathlib import Path
    sys.path[:0] = [{tests!r}, {root!r}]
    from tiny_runs import TINY, interrupt, sample_images
    from training.pretrain import pretrain

    class Patch:
        setattr = staticmethod(setattr)

    # no file may grow beyond this, as if the disk were full: from step 5 on
    interrupt(Patch, 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})))
    try:
        pretrain(TINY, sample_images(), Path({output!r}), checkpoint_seconds=0.0)
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(images, tmp_path):
    code = textwrap.dedent(FULL).format(
        tests=str(ROOT / "tests"), root=str(ROOT), output=str(tmp_path / "run"), limit=20_000
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("the checkpoint of step 5 cannot be written (")
    assert "step-000004 is kept: make room, then --resume" in result.stdout
    assert find_checkpoint(tmp_path / "run").name == "step-000004"
    pretrain(TINY, images, tmp_path / "run", resume=True)


def test_a_finished_run_that_is_older_than_a_field_of_its_recipe_has_its_default(images, stopped):
    file = pretrain(TINY, images, stopped, resume=True)
    run = json.loads((stopped / "run.json").read_text())
    del run["recipe"]["pretrained"]
    (stopped / "run.json").write_text(json.dumps(run))
    assert pretrain(TINY, images, stopped, resume=True) == file
    with pytest.raises(ValueError, match=r"of another recipe \(pretrained differ\)"):
        pretrain(dataclasses.replace(TINY, pretrained=True), images, stopped, resume=True)


def test_what_a_run_began_with_is_what_was_published_then(images, tmp_path, monkeypatch):
    recipe = dataclasses.replace(SHORT, model="rotnet_nin.cifar10", pretrained=True)
    interrupt(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    checkpoint = pretrain(recipe, images, tmp_path)
    begun = json.loads((checkpoint / PROGRESS).read_text())["begun_with"]
    assert begun["sha256"] == zoo.manifest()["rotnet_nin.cifar10"]["sha256"]
    monkeypatch.undo()
    monkeypatch.setattr(loop, "published_weights_of", lambda network: {"name": "rotnet_nin.cifar10", "sha256": "new"})
    pretrain(recipe, images, tmp_path, resume=True)
    assert json.loads((tmp_path / "run.json").read_text())["begun_with"] == begun


def test_a_run_is_finished_only_when_its_weights_are_whole(images, tmp_path, monkeypatch):
    """A full disk while the outputs are written leaves the checkpoint, and resuming finishes."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "write_config", full)
    with pytest.raises(OSError, match="No space left"):
        pretrain(SHORT, images, tmp_path / "run", checkpoint_seconds=0.0)
    monkeypatch.undo()
    pretrain(SHORT, images, tmp_path / "run", resume=True)
    pretrain(SHORT, images, tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("kept", [True, False])
def test_a_loss_that_is_not_finite_stops_the_run(images, tmp_path, monkeypatch, kept):
    """It names step and learning rate; the checkpoint before is kept, and is good."""
    interrupt(monkeypatch, 8, lambda: math.nan)
    with pytest.raises(ValueError) as caught:
        pretrain(TINY, images, tmp_path, checkpoint_seconds=0.0 if kept else 1e9)
    monkeypatch.undo()
    left = f"the last good checkpoint is {tmp_path}/checkpoints/step-000007" if kept else "no checkpoint was due yet"
    # in step 8 of 30, noticed there or at the curve's next point: Muon's rate 0.1 after a warm-up of 3 steps
    rate = 0.1 * (30 - 7) / 27
    assert str(caught.value) == (
        f"the loss became nan in step 8 of nin-cifar10-cpu, at a learning rate of {rate:.3g}: lower it; {left}"
    )
    assert not (tmp_path / "model.safetensors").exists()
    if kept:
        pretrain(TINY, images, tmp_path, resume=True)
        pretrain(TINY, images, tmp_path / "whole")
        assert same(weights(tmp_path), weights(tmp_path / "whole"))


def test_a_rate_that_is_too_high_never_leaves_broken_weights(images, tmp_path):
    recipe = dataclasses.replace(TINY, optimizer=Sgd(lr=1e30))
    with pytest.raises(ValueError, match=r"(the loss became|the weights became infinite)"):
        pretrain(recipe, images, tmp_path, checkpoint_seconds=0.0)
    # the rate of the first step is 0
    kept = load_file(find_checkpoint(tmp_path) / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values() if tensor.is_floating_point())


def test_leftovers_of_a_kill_are_not_a_checkpoint(images, stopped, monkeypatch):
    """They go with the next checkpoint; what is not of the run stays, and is in nobody's way."""
    folder = find_checkpoint(stopped)
    shutil.copytree(folder, folder.with_name("step-000099.tmp"))
    (folder.parent / "step-nonsense").mkdir()
    (folder.parent / "notes.txt").write_text("")
    assert find_checkpoint(stopped) == folder
    interrupt(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    last = pretrain(TINY, images, stopped, resume=True)
    assert sorted(path.name for path in last.parent.iterdir()) == [
        "notes.txt",
        "step-000011",
        "step-000012",
        "step-nonsense",
    ]
