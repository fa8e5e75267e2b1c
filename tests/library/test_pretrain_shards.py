"""Pretraining from tar shards: the same run as from a folder, whatever reads it, and shards that are no good."""

import dataclasses
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLES
from hypothesis import given
from hypothesis import strategies as st
from many_images import write_tar
from tiny_runs import SHORT, TINY, assert_two_trained_as_one, interrupt, run_killed, same, weights

import rotation_ssl
from rotation_ssl import cli
from rotation_ssl.pretraining import batches, outputs, setup, shards
from rotation_ssl.pretraining.batches import SHARDS_TOGETHER, augmented_batches, step_indices, step_windows
from rotation_ssl.pretraining.images import UnlabelledImages, fingerprint, open_images
from rotation_ssl.pretraining.loop import pretrain
from rotation_ssl.pretraining.recipe import Stage
from rotation_ssl.pretraining.setup import create_model
from rotation_ssl.pretraining.shards import index_shards, is_shards, member_name, read_member
from rotation_ssl.pretraining.state import find_checkpoint
from training.__main__ import main as training_main

FILES = sorted((SAMPLES / "cifar10").glob("*.png"))
CONTENTS = [file.read_bytes() for file in FILES]


def write_shards(folder, sizes):
    """The sample images in shards of so many, each beside a text as webdataset has it; the pattern of all."""
    folder.mkdir(exist_ok=True)
    first = 0
    for shard, size in enumerate(sizes):
        members = []
        for i in range(first, first + size):
            members += [(f"{i:03d}.png", CONTENTS[i]), (f"{i:03d}.cls", b"4")]
        write_tar(folder / f"{shard:03d}.tar", members or [("nothing.txt", b"no image")])
        first += size
    return folder / f"{{000..{len(sizes) - 1:03d}}}.tar"


@pytest.fixture
def few(tmp_path):
    """All 40 images in four shards, one of which has none."""
    return write_shards(tmp_path / "few", [17, 0, 3, 20])


@pytest.fixture
def many(tmp_path):
    """All 40 images in more shards than are taken together."""
    return write_shards(tmp_path / "many", [2] * 20)


@pytest.fixture
def folder(tmp_path):
    """The same images as files."""
    return shutil.copytree(SAMPLES / "cifar10", tmp_path / "folder")


# --- the same images, in the same order


def test_an_image_of_a_shard_is_that_of_the_file(few, folder):
    images, files = open_images("folder", few, 16), open_images("folder", folder, 16)
    assert len(images) == len(files) == 40 and images.shards == (0, 17, 17, 20)
    for i in range(40):
        assert torch.equal(images[i][0], files[i][0])
    assert images.name_of(16) == f"{few.parent}/000.tar: 016.png"
    assert images.name_of(17) == f"{few.parent}/002.tar: 017.png"
    assert images.name_of(39) == f"{few.parent}/003.tar: 039.png"


def test_few_shards_train_as_a_folder_does(few, folder, tmp_path):
    recipe = dataclasses.replace(TINY, holdout=4)
    pretrain(recipe, open_images("folder", few, 16), tmp_path / "shards")
    pretrain(recipe, open_images("folder", folder, 16), tmp_path / "files")
    assert same(weights(tmp_path / "shards"), weights(tmp_path / "files"))
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("shards", "files")]
    assert runs[0]["images"].startswith("40 images in 4 files whose names, sizes and times have sha256 ")
    for name in ("recipe", "holdout_rotation_accuracy"):
        assert runs[0][name] == runs[1][name]


def test_the_number_of_workers_changes_nothing(many, tmp_path):
    for workers in (0, 1, 2):
        pretrain(TINY, open_images("folder", many, 16, workers=workers), tmp_path / str(workers), workers=workers)
    held = open_images("folder", many, 16)
    held.read_all()
    pretrain(TINY, held, tmp_path / "held")
    for name in ("1", "2", "held"):
        assert same(weights(tmp_path / "0"), weights(tmp_path / name)), name


@pytest.mark.parametrize("step", [4, 14])
def test_a_stopped_run_goes_on_exactly(many, tmp_path, monkeypatch, step):
    """In the middle of the shards of one epoch and of the next, with another number of workers."""
    pretrain(TINY, open_images("folder", many, 16), tmp_path / "whole")
    interrupt(monkeypatch, step, lambda: signal.raise_signal(signal.SIGTERM))
    assert pretrain(TINY, open_images("folder", many, 16), tmp_path / "parts").name == f"step-{step:06d}"
    monkeypatch.undo()
    pretrain(TINY, open_images("folder", many, 16), tmp_path / "parts", resume=True, workers=1)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(many, tmp_path):
    result = run_killed(many, tmp_path / "parts")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert find_checkpoint(tmp_path / "parts").name == "step-000004"
    pretrain(SHORT, open_images("folder", many, 16), tmp_path / "parts", resume=True)
    pretrain(SHORT, open_images("folder", many, 16), tmp_path / "whole")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_the_function_is_the_command(few, tmp_path, capsys):
    options = dict(steps=6, image_size=16, images_per_step=4, precision="fp32", device="cpu", tracker=None, workers=1)
    rotation_ssl.pretrain(few, tmp_path / "function", "test_resnet", stream=True, **options)
    arguments = [
        *("pretrain", "--data", str(few), "--output", str(tmp_path / "command"), "--model", "test_resnet"),
        *("--size", "16", "--steps", "6", "--images-per-step", "4", "--precision", "fp32", "--device", "cpu"),
        *("--tracker", "none", "--workers", "1"),
    ]
    assert cli.main(arguments) == 0
    assert "indexing shards: 100%" in capsys.readouterr().err
    assert same(weights(tmp_path / "function"), weights(tmp_path / "command"))
    (few.parent / "002.tar").unlink()
    assert cli.main([*arguments[:-1], "0", "--resume"]) == 2
    told = capsys.readouterr().err
    assert told == f"error: 1 of 4 shards not found: {few.parent}/002.tar\n"


# --- the order

sizes = st.lists(st.integers(0, 5), min_size=1, max_size=60).filter(sum)


def epoch(sizes, seed, number, count=None, step=1):
    """The images of an epoch, step by step."""
    firsts = tuple(np.cumsum([0, *sizes[:-1]]).tolist())
    recipe = dataclasses.replace(TINY, images_per_step=step, seed=seed)
    count = count or sum(sizes)
    steps = count // step
    return [step_indices(recipe, count, number * steps + i, firsts).tolist() for i in range(steps)]


@given(sizes=sizes, seed=st.integers(0, 2**64 - 1), number=st.integers(0, 100), data=st.data())
def test_every_image_once_an_epoch_and_some_shards_at_a_time(sizes, seed, number, data):
    count = data.draw(st.integers(1, sum(sizes)))
    order = [image for (image,) in epoch(sizes, seed, number, count)]
    assert sorted(order) == list(range(count)), "those held out, the last ones, are none of them"
    batches._epoch_order.cache_clear()
    assert order == [image for (image,) in epoch(sizes, seed, number, count)], "of seed and epoch alone"
    assert most_open(sizes, order) <= SHARDS_TOGETHER


def most_open(sizes, order):
    """Shards that are begun and not yet ended, at most."""
    shard = np.repeat(np.arange(len(sizes)), sizes)[order]
    spans = [(np.flatnonzero(shard == s)[0], np.flatnonzero(shard == s)[-1]) for s in set(shard)]
    return max(sum(first <= position <= last for first, last in spans) for position in range(len(order)))


@pytest.mark.parametrize(("count", "together"), [(16, 16), (17, 9), (33, 11)])
def test_shards_are_taken_in_groups_of_about_one_size(count, together):
    order = [image for (image,) in epoch([30] * count, 0, 0)]
    assert most_open([30] * count, order) == together


def test_epochs_and_seeds_have_orders_of_their_own():
    sizes = [3] * 40
    orders = [epoch(sizes, seed, number) for seed in (0, 1) for number in (0, 1)]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])
    first = [{order[i][0] // 3 for i in range(30)} for order in orders]
    assert len(first[0] | first[1]) > SHARDS_TOGETHER, "other shards come together"


def test_a_folder_is_one_shard_and_its_order_is_what_it_was():
    expected = [13, 31, 10, 4, 34, 39, 6, 27]
    orders = [[image for (image,) in epoch(sizes, 7, 3)] for sizes in ([40], [1, 30, 0, 9], [5] * 8)]
    assert orders[0][:8] == expected and orders[1:] == orders[:1] * 2


def test_crops_are_what_they_were():
    windows = step_windows(TINY, 40, 5)
    assert windows.top.tolist() == [2, -2, 1, 7] and windows.left.tolist() == [6, 4, 0, 6]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_see_other_images_and_together_all(processes):
    """Marked images, through the batches of each process, in two parts of a step."""
    recipe = dataclasses.replace(TINY, images_per_step=8, padding=0, image_size=8, stages=(Stage(5, 8),))
    model = create_model(recipe)
    images = UnlabelledImages(8, 40, None, shards=tuple(range(0, 40, 2)))
    images.squares = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 8, 8)
    mean, std = (torch.tensor(model.pretrained_cfg[name])[0] * 255 for name in ("mean", "std"))

    def seen(process):
        accelerator = SimpleNamespace(
            gradient_accumulation_steps=2, num_processes=processes, process_index=process, device=torch.device("cpu")
        )
        of_process = augmented_batches(recipe, model, images, 40, accelerator, 0, set())
        # an epoch: 5 steps of 2 parts
        return [(next(of_process)[:, 0, 0, 0] * std + mean).round().int().tolist() for _ in range(10)]

    shares = [seen(process) for process in range(processes)]
    assert sorted(image for share in shares for part in share for image in part) == list(range(40))
    whole = epoch([2] * 20, recipe.seed, 0, step=8)
    for step in range(5):
        parts = [image for part in (0, 1) for share in shares for image in share[2 * step + part]]
        assert parts == whole[step], "what one process takes, in the same order"


# --- the index


def test_an_index_takes_twelve_bytes_an_image(few):
    index = index_shards(str(few))
    assert index.starts.nbytes + index.lengths.nbytes == 12 * 40 == 12 * len(index)
    assert index.firsts.tolist() == [0, 17, 17, 20]
    content = (few.parent / "002.tar").read_bytes()
    start, length = int(index.starts[18]), int(index.lengths[18])
    assert content[start + 512 : start + length] == CONTENTS[18], "a header of 512 bytes, then the file"
    assert content[start : start + 7] == b"018.png"


@pytest.mark.parametrize("options", [{"format": form} for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT)] + [{}])
def test_only_images_and_whatever_they_are_called(tmp_path, options):
    """Long names and those of other languages; links, folders, devices, hidden files and texts are none."""
    long = "/".join(["folder" * 8] * (3 if options.get("format") == tarfile.USTAR_FORMAT else 9)) + "/é\u202e \n.PNG"
    special = [tarfile.TarInfo(f"{kind.decode()}.png") for kind in (b"1", b"2", b"3", b"4", b"5", b"6")]
    for info in special:
        info.type, info.linkname = info.name[0].encode(), "/etc/hostname"
    texts = [("notes.txt", b"text"), (".hidden.png", CONTENTS[1]), ("a/._b.png", CONTENTS[1]), ("png", CONTENTS[1])]
    members = [*((info, b"") for info in special), *texts, (long, CONTENTS[2]), ("../up.jpeg", CONTENTS[3])]
    file = write_tar(tmp_path / "x.tar", members, **options)
    before = sorted(tmp_path.parent.rglob("*"))
    index = index_shards(str(file))
    assert len(index) == 2
    assert member_name(index, 0) == f"{file}: {long[:-8]}é? .PNG"
    assert member_name(index, 1) == f"{file}: ../up.jpeg"
    images = open_images("folder", file, 16)
    images.read_all()
    assert not images.broken and sorted(tmp_path.parent.rglob("*")) == before, "nothing is written"


def test_the_same_name_in_two_shards_is_two_images(tmp_path):
    for name, content in zip("ab", CONTENTS, strict=False):
        write_tar(tmp_path / f"{name}.tar", [("same.png", content)] * 2)
    index = index_shards(str(tmp_path / "{a,b}.tar"))
    assert [member_name(index, i) for i in range(4)] == [f"{tmp_path}/{s}.tar: same.png" for s in "aabb"]
    assert read_member(index, 0).tobytes() != read_member(index, 2).tobytes()


def test_what_is_taken_for_shards(tmp_path):
    for name in ("x.tar", "{0..9}.tar", "{a.tar,b.tar}", "a/{00..99}.TAR", "x.tar.gz", "x.tgz", "s3://b/{0..9}.tar"):
        assert is_shards(name), name
    (tmp_path / "old.tar").mkdir()
    for name in ("x", "target", "x.target", tmp_path / "old.tar", tmp_path):
        assert not is_shards(name), name
    with pytest.raises(ValueError, match=r"image folder .*old\.tar holds no images"):
        open_images("folder", tmp_path / "old.tar", 16)


# --- shards that are no good


def refused(pattern, message, workers=0):
    with pytest.raises(ValueError, match=message) as caught:
        open_images("folder", pattern, 16, workers=workers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_archive_without_members_is_a_shard_without_images(few, tmp_path):
    write_tar(tmp_path / "few" / "001.tar", [])
    assert len(open_images("folder", few, 16)) == 40


def test_patterns_that_are_refused(few, tmp_path):
    refused(tmp_path / "none.tar", rf"^1 of 1 shard not found: {tmp_path}/none\.tar$")
    refused(tmp_path / "few" / "{000..009}.tar", r"^6 of 10 shards not found: .*004\.tar, .*006\.tar and 3 more$")
    refused(tmp_path / "few" / "00{0,2,0}.tar", r"gives shards twice: .*000\.tar$")
    refused(tmp_path / "few" / "{000..003.tar", "braces that are not closed")
    refused(tmp_path / "few" / "001.tar", r"^no images \(\.png, .*\) in 1 shard, .*001\.tar$")
    for address in ("s3://bucket/{000..003}.tar", "https://host/x.tar"):
        refused(address, rf"^shards of {address.partition(':')[0]}:// are not read: .*; copy the shards to a disk")
    content = (few.parent / "000.tar").read_bytes()
    for name in ("x.tar.gz", "x.tar"):
        (tmp_path / name).write_bytes(gzip.compress(content))
        refused(tmp_path / name, rf"^shard .*{name} cannot be read \(it is compressed: ")
    with pytest.raises(ValueError, match=r"from start to end: .* or give its tar files as --data|cannot be opened"):
        open_images("wds/anything", tmp_path, 32)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shards_are_named_before_anything_is_trained(few, tmp_path, workers):
    first, last = few.parent / "000.tar", few.parent / "003.tar"
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    last.write_bytes(b"")
    told = refused(few, r"^shard .*000\.tar cannot be read \(.*\): copy it again or make a new one", workers)
    assert told.endswith("(1 other shard too)")


def test_a_cut_anywhere_is_noticed(tmp_path):
    """Between members too, where tarfile itself takes what is there for all."""
    content = write_tar(tmp_path / "x.tar", [("a.png", b"a" * 700), ("b.png", b"b" * 700)]).read_bytes()
    end = 2 * (512 + 1024)
    for length in [*range(0, end + 512, 128), end - 1, end + 511]:
        (tmp_path / "x.tar").write_bytes(content[:length])
        refused(tmp_path / "x.tar", "cannot be read")
    (tmp_path / "x.tar").write_bytes(content[: end + 512])
    assert len(index_shards(str(tmp_path / "x.tar"))) == 2
    damaged = bytearray(content)
    damaged[1536 + 5] ^= 1
    (tmp_path / "x.tar").write_bytes(damaged)
    refused(tmp_path / "x.tar", r"cannot be read \(bad checksum\)")


def test_a_size_that_leads_back_does_not_go_round_for_ever(tmp_path):
    header = bytearray(tarfile.TarInfo("c.txt").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-2048 & (2**96 - 1)).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content = write_tar(tmp_path / "x.tar", [("a.png", b"a" * 1024), ("b.txt", b"b" * 1024)]).read_bytes()
    # the size of the third member, at byte 3072, leads back to the second one
    (tmp_path / "x.tar").write_bytes(content[:3072] + bytes(header) + bytes(1024))
    refused(tmp_path / "x.tar", r"cannot be read \(the (size of c\.txt is wrong|header at byte 3,072 is damaged)")


def test_broken_images_are_skipped_and_named(tmp_path, monkeypatch, capsys):
    members = [(f"{i:02d}.png", content) for i, content in enumerate(CONTENTS)]
    members[3] = ("03.png", CONTENTS[3][:200])
    members[4] = ("04.png", b"")
    members[5] = ("05.png", CONTENTS[5] + bytes(2**15))
    file = write_tar(tmp_path / "x.tar", members)
    monkeypatch.setattr(shards, "MAX_IMAGE_BYTES", 2**15)
    images = open_images("folder", file, 16)
    with pytest.raises(ValueError) as caught:
        images.read(3)
    assert str(caught.value).startswith(f"image {file}: 03.png does not decode (")
    assert "BytesIO" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"^image {file}: 05\.png has more than the 32,768 bytes allowed; replace"):
        images.read(5)
    assert images[3][1] == [3, 4, 5] and torch.equal(images[3][0], images[6][0])
    arguments = ["pretrain", "--data", str(file), "--model", "test_resnet", "--size", "16", "--steps", "10"]
    arguments += ["--images-per-step", "4", "--precision", "fp32", "--device", "cpu", "--tracker", "none"]
    assert cli.main([*arguments, "--workers", "0", "--output", str(tmp_path / "run")]) == 0
    named = ", ".join(f"{file}: 0{i}.png" for i in (3, 4, 5))
    assert f"skipped 3 broken images: {named} (run.json lists all)" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["broken_images"] == named.split(", ")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_an_error_and_the_checkpoint_is_kept(many, tmp_path, monkeypatch, workers):
    away = tmp_path / "away"
    interrupt(monkeypatch, 4, lambda: many.parent.rename(away) and None)
    with pytest.raises(ValueError, match=r"^shard .*\.tar is not what it was when it was indexed \(.*No such file"):
        pretrain(TINY, open_images("folder", many, 16), tmp_path / "run", checkpoint_seconds=0.0, workers=workers)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path / "run") is not None
    away.rename(many.parent)
    pretrain(TINY, open_images("folder", many, 16), tmp_path / "run", resume=True)
    pretrain(TINY, open_images("folder", many, 16), tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_shard_that_is_replaced_or_cut_while_it_is_read(few):
    index = index_shards(str(few))
    file = few.parent / "000.tar"
    content = file.read_bytes()
    for other, reason in ((content[512:], ""), (content[:1000], "it is cut off"), (bytes(9999), "others|empty")):
        file.write_bytes(other)
        with pytest.raises(OSError, match=rf"^shard {file} is not what it was when it was indexed \(.*{reason}"):
            read_member(index, 0)
    write_tar(file, [("000.png", CONTENTS[0][:-1])])
    with pytest.raises(OSError, match="its members are others"):
        read_member(index, 0)
    assert open_images("folder", few, 16)[0], "indexed again"


def test_changed_shards_are_refused_at_resume(few, tmp_path, monkeypatch):
    interrupt(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM))
    pretrain(SHORT, open_images("folder", few, 16), tmp_path / "parts")
    monkeypatch.undo()
    file = few.parent / "003.tar"
    time = file.stat().st_mtime_ns
    os.utime(file, ns=(0, time + 1))
    with pytest.raises(ValueError, match=r"another run \(the images changed: 40 images in 4 files whose names, sizes"):
        pretrain(SHORT, open_images("folder", few, 16), tmp_path / "parts", resume=True)
    os.utime(file, ns=(0, time))
    other = few.parent / "{003,000,001,002}.tar"
    assert fingerprint(open_images("folder", other, 16)) != fingerprint(open_images("folder", few, 16))
    with pytest.raises(ValueError, match="the images changed: 40 images in 4 files"):
        pretrain(SHORT, open_images("folder", other, 16), tmp_path / "parts", resume=True)
    # another place, with the same times
    shutil.copytree(few.parent, tmp_path / "copied")
    pretrain(SHORT, open_images("folder", tmp_path / "copied" / few.name, 16), tmp_path / "parts", resume=True)


# --- several machines


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun_nodes(count, *arguments):
    """A process on each of so many machines, which are all this one; the output of each machine."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    starter = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(count), "--nproc-per-node", "1"]
    starter += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    started = [
        subprocess.Popen(
            [*starter, "--node-rank", str(node), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for node in range(count)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, printed
    return printed


def test_another_output_on_another_machine_is_refused(few, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "gather_object", lambda mine: [*mine, False])
    with pytest.raises(ValueError, match=rf"^{tmp_path}/run is not the same folder on all machines: give an --output"):
        pretrain(SHORT, open_images("folder", few, 16), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_output_that_another_machine_sees_late_is_waited_for(tmp_path, monkeypatch):
    """NFS remembers for a while that a name did not exist."""
    second, waited = SimpleNamespace(is_main_process=False), []
    for name in ("broadcast_object_list", "gather_object"):
        monkeypatch.setattr(outputs, name, lambda mine: mine)

    def appear(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            (tmp_path / ".lock").touch()

    monkeypatch.setattr("time.sleep", appear)
    with outputs.lock_output(second, tmp_path):
        assert len(waited) == 3
    monkeypatch.setattr(outputs, "APPEARS_WITHIN", -1)
    other = outputs.lock_output(second, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is not the same folder on all machines"), other:
        pass


def test_other_shards_on_another_machine_are_refused(few, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "gather_object", lambda mine: [*mine, mine[0] | {"images": "others", "seed": "1"}])
    with pytest.raises(ValueError, match=r"started with different options or images \(seed, images\): give all mach"):
        pretrain(SHORT, open_images("folder", few, 16), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_machines_train_as_one(many, tmp_path):
    """Gloo on loopback, a model without batch norm: the same curve, and the same weights but for rounding."""
    arguments = [
        *("pretrain", "nin-cifar10-paper", "--dataset", "folder", "--data", str(many), "--model", "test_convnext"),
        *("--steps", "12", "--images-per-step", "8", "--tracker", "none", "--stream", "--workers", "1"),
        *("--checkpoint-seconds", "0", "--output"),
    ]
    printed = torchrun_nodes(2, "-m", "training", *arguments, str(tmp_path / "two"))
    assert sorted(out.count("wrote ") for out, _ in printed) == [0, 1], "the first machine tells"
    assert training_main([*arguments, str(tmp_path / "one")]) == 0
    assert_two_trained_as_one(tmp_path)
