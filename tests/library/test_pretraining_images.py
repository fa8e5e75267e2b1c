"""Images to pretrain on: the same in memory as streamed, broken ones counted, memory flat, formats and EXIF."""

import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLES
from PIL import Image
from tiny_runs import SHORT, TINY, interrupt, same, weights

from rotation_ssl.images import read_image, read_images
from rotation_ssl.pretraining.command import run
from rotation_ssl.pretraining.images import (
    UnlabelledImages,
    _read_entry,
    fingerprint,
    open_entries,
    open_images,
    stream,
)
from rotation_ssl.pretraining.loop import pretrain
from training import pretrain as command
from training.recipes import RECIPES

FILES = sorted((SAMPLES / "cifar10").glob("*.png"))


@pytest.fixture
def folder(tmp_path):
    """The sample images, in folders within folders, some broken, beside what is no image."""
    for number, file in enumerate(FILES):
        target = tmp_path / "photos" / f"{number // 20}" / f"{number // 7}" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def broken_files(folder):
    files = sorted(folder.rglob("*.png"))
    chosen = [files[3], files[4], files[39]]
    chosen[0].write_bytes(chosen[0].read_bytes()[:200])
    chosen[1].write_bytes(b"")
    chosen[2].write_text("text")
    return chosen


def test_folders_are_read_to_any_depth(folder):
    images = open_images("folder", folder, 32)
    files = sorted(folder.rglob("*.png"))
    assert len(images) == 40 and [images.name_of(i) for i in range(40)] == list(map(str, files))
    assert torch.equal(torch.stack([images[i][0] for i in range(40)]), read_images(files, 32))


def test_of_train_and_test_images_only_train_is_read(small_cifar10):
    images = open_images("folder", small_cifar10, 32)
    assert len(images) == 40 and all("/train/" in images.name_of(i) for i in range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_is_the_same_as_in_memory(folder, tmp_path, workers):
    broken = broken_files(folder)
    held, streamed = (open_images("folder", folder, 16) for _ in range(2))
    held.set_holdout(4)
    held.read_all(workers)
    assert held.broken == {3, 4, 39} and held.squares.shape == (40, 3, 16, 16)
    for position, other in ((3, 5), (4, 5), (39, 36)):
        assert torch.equal(held.squares[position], held.squares[other]), (
            "the next one takes its place, of those held out too"
        )
    recipe = dataclasses.replace(TINY, holdout=4)
    pretrain(recipe, held, tmp_path / "held", workers=workers)
    pretrain(recipe, streamed, tmp_path / "streamed", workers=workers)
    assert same(weights(tmp_path / "held"), weights(tmp_path / "streamed"))
    for name in ("held", "streamed"):
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert run["broken_images"] == list(map(str, broken)), "of those held out too"


def test_batches_come_in_order_whoever_decodes(folder):
    images = open_images("folder", folder, 8)
    indices = torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(7)
    alone, helped = ([pixels for pixels, _ in stream(images, indices, workers)] for workers in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    images.read_all()
    assert all(torch.equal(a, b) for a, (b, _) in zip(alone, stream(images, indices), strict=True))


def kill_oneself(index):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_told_in_one_line():
    images = UnlabelledImages(8, 4, kill_oneself)
    with pytest.raises(
        OSError, match=r"^a data-loading worker was killed \(DataLoader worker .*; run it again, or resume it$"
    ):
        list(stream(images, torch.arange(4).split(2), workers=1))


def test_a_process_that_is_killed_during_a_step_is_told_in_one_line(folder, tmp_path, monkeypatch):
    before = multiprocessing.active_children()

    def kill():
        (worker,) = set(multiprocessing.active_children()) - set(before)
        os.kill(worker.pid, signal.SIGKILL)
        # PyTorch hears of it here if the process is a child of this one, else where it waits for images
        threading.Event().wait(1)

    interrupt(monkeypatch, 2, kill)
    options = dict(device="cpu", tracker=None, stream=True, workers=1)
    with pytest.raises(
        OSError, match=r"^a data-loading worker was killed \(DataLoader worker .*; run it again, or resume it$"
    ):
        run(SHORT, lambda _: open_images("folder", folder, 16), tmp_path / "run", **options)


def test_a_disk_that_fails_is_not_a_broken_image(folder, monkeypatch):
    images = open_images("folder", folder, 8)
    monkeypatch.setattr(Image, "open", failing(errno.EIO))
    with pytest.raises(ValueError, match=r"\[Errno 5\] image .*\.png cannot be read, try again: Input/output error"):
        list(stream(images, torch.arange(4).split(2)))
    monkeypatch.setattr(Image, "open", failing(errno.EACCES))
    with pytest.raises(ValueError, match=r"skipped 40 broken images in a row"):
        list(stream(images, torch.arange(4).split(2)))


def failing(number):
    def fail(file):
        raise OSError(number, os.strerror(number), str(file))

    return fail


def test_images_in_memory_keep_those_held_out_apart(folder):
    images = open_images("folder", folder, 8)
    images.read_all()
    with pytest.raises(ValueError, match="read with 0 held out, not 4"):
        images.set_holdout(4)


def test_an_entry_of_the_datasets_library():
    """What timm's reader holds of one, decoding left to us; labels are not asked for."""
    content = FILES[0].read_bytes()
    entries = [{"image": {"bytes": content}}, {"image": {"bytes": None, "path": str(FILES[1])}}, {"image": {}}]

    class Reader:
        image_key, dataset = "image", entries

    class Wrapped:
        reader = Reader()

    images = UnlabelledImages(32, 3, partial(_read_entry, Wrapped()))
    images.read_all()
    assert torch.equal(images.squares[:2], read_images(FILES[:2], 32)) and images.broken == {2}


def test_nothing_that_decodes(tmp_path):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_text("text")
    images = open_images("folder", tmp_path, 32)
    for workers in (0, 1):
        with pytest.raises(
            ValueError, match=r"^skipped 2 broken images in a row, the last one: image .*b\.jpg does not"
        ):
            images.read_all(workers)


def test_the_fingerprint_of_a_folder_tells_what_changed(folder, tmp_path):
    """Names below the folder, sizes and times; not where it is, how the images are read, or what is no image."""
    whole = fingerprint(open_images("folder", folder, 16))
    assert whole.startswith("40 files whose names, sizes and times have sha256 ")
    shutil.copytree(folder, tmp_path / "copied")
    (tmp_path / "copied" / "notes.txt").write_text("other notes")
    copied = open_images("folder", tmp_path / "copied", 32)
    copied.read_all()
    assert fingerprint(copied) == whole
    seen = {whole}

    def changed():
        found = fingerprint(open_images("folder", folder, 16))
        known = found in seen
        seen.add(found)
        return not known

    assert not changed()
    first, second, *_, last = sorted(folder.rglob("*.png"))
    content, times = first.read_bytes(), (0, first.stat().st_mtime_ns)
    first.write_bytes(content + b"more")
    os.utime(first, ns=times)
    assert changed(), "its size"
    first.write_bytes(content)
    os.utime(first, ns=(0, times[1] + 1))
    assert changed(), "its time"
    os.utime(first, ns=times)
    assert not changed()
    second.rename(second.with_name("other.png"))
    assert changed(), "a name"
    last.unlink()
    assert changed(), "one fewer"
    last.symlink_to(folder / "nowhere.png")
    assert changed(), "a link that leads nowhere is a broken image"


def test_the_fingerprint_of_pixels():
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    by_hand = hashlib.sha256(b"(2, 3, 2, 2)" + bytes(range(24))).hexdigest()
    assert fingerprint(images) == f"pixels with sha256 {by_hand}"
    assert fingerprint(images.to(memory_format=torch.channels_last)) == fingerprint(images)
    assert fingerprint(images.view(4, 3, 1, 2)) != fingerprint(images)


def test_the_fingerprint_of_other_data_sets(small_cifar10):
    """Of torchvision's folders that of the files; of those that only their library reads, length and name."""
    ours = fingerprint(open_images("folder", small_cifar10, 32))
    assert fingerprint(open_images("torch/image_folder", small_cifar10, 32)) == ours
    assert fingerprint(open_entries([None] * 7, 32, "hfds/someone/photos")) == "7 images of hfds/someone/photos"


def test_what_fits_into_memory(monkeypatch):
    from rotation_ssl.pretraining import images as unlabelled

    images = UnlabelledImages(10, 100, lambda index: None)  # 30,000 bytes
    for available, copies, fits in ((60_000, 1, True), (59_999, 1, False), (60_000, 2, False), (None, 1, True)):
        monkeypatch.setattr(unlabelled, "available_memory", lambda available=available: available)
        assert images.fits_memory(copies) == fits


def test_memory_is_what_a_container_may_have(tmp_path, monkeypatch):
    from rotation_ssl import machine as memory

    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    read, told = Path.read_text, "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n"

    def read_or_tell(file, *arguments, **options):
        return told if file == Path("/proc/meminfo") else read(file, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_or_tell)
    assert memory.available_memory() == 8_192_000_000
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() == 8_192_000_000
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.available_memory() == 4000
    cached = "anon 100\nfile 700\nactive_file 200\ninactive_file 300\n"
    (tmp_path / "memory.stat").write_text(cached)
    assert memory.available_memory() == 4500, "cached files go when memory is asked for"
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("5000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("1000\n")
    (tmp_path / "memory" / "memory.stat").write_text(f"{cached}total_active_file 20\ntotal_inactive_file 30\n")
    assert memory.available_memory() == 4050


STREAMED = """
    import multiprocessing, sys
    from pathlib import Path
    sys.path[:0] = [{root!r}]
    import torch
    from rotation_ssl.pretraining.images import open_images, stream

    def peak(process):
        # getrusage's figure would begin with that of pytest
        (line,) = (l for l in Path(f"/proc/{{process}}/status").read_text().splitlines() if l.startswith("VmHWM:"))
        return int(line.split()[1]) // 1024

    images = open_images("folder", Path({folder!r}), 256)
    workers = []
    for batch, _ in stream(images, torch.arange(len(images)).split(8), workers=1):
        workers = [peak(child.pid) for child in multiprocessing.active_children()] or workers
    print(peak("self"), *workers)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_stays_flat_however_many_images(folder, tmp_path):
    """800 images of 256 pixels are 157 MB: streaming them takes no more than streaming 80 does."""
    peaks = []
    for copies in (2, 20):
        many = tmp_path / str(copies)
        for copy in range(copies):
            shutil.copytree(folder, many / str(copy), copy_function=os.symlink)
        code = textwrap.dedent(STREAMED).format(root=str(ROOT), folder=str(many))
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append([int(megabytes) for megabytes in result.stdout.split()])
    assert len(peaks[0]) == len(peaks[1]) == 2
    assert peaks[1][0] < peaks[0][0] + 60 and peaks[1][1] < peaks[0][1] + 60, peaks


def test_images_are_upright_as_their_exif_says(tmp_path):
    image = Image.open(FILES[0]).convert("RGB")
    for orientation, turn in ((1, None), (6, Image.Transpose.ROTATE_270), (8, Image.Transpose.ROTATE_90)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "photo.png", exif=exif)
        expected = image if turn is None else image.transpose(turn)
        assert read_image(tmp_path / "photo.png").tobytes() == expected.tobytes()


def test_a_wrong_exif_tag_does_not_break_an_image(tmp_path):
    """Orientation 6 beside an XResolution that is text, as some cameras write it: Pillow cannot write that again."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    image = Image.open(FILES[0]).convert("RGB")
    image.save(tmp_path / "photo.png", exif=exif)
    expected = image.transpose(Image.Transpose.ROTATE_270)
    assert read_image(tmp_path / "photo.png").tobytes() == expected.tobytes()


def test_names_of_timms_data_sets(folder, small_cifar10, tmp_path):
    images = open_images("torch/image_folder", small_cifar10, 32)
    assert len(images) == 40
    images.read_all()
    ours = open_images("folder", small_cifar10, 32)
    assert torch.equal(images.squares, torch.stack([ours[i][0] for i in range(40)]))
    broken_files(small_cifar10 / "train")
    decoding = open_images("torch/image_folder", small_cifar10, 32)
    decoding.read_all()
    assert len(decoding.broken) == 3, "torchvision decodes by itself"
    for name, message in (
        ("torch/nothing", "'torch/nothing' in .* cannot be opened"),
        ("wds/anything", "cannot be opened|from start to end"),
        ("nosuch", "no dataset is called 'nosuch': give folder, or a name such as torch/places365"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            open_images(name, tmp_path, 32)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"--download is for datasets of torchvision: give --dataset torch/NAME"):
        open_images("folder", small_cifar10, 32, download=True)


def test_one_command_on_a_folder_of_ones_own(folder, tmp_path, capsys):
    broken = broken_files(folder)
    arguments = [
        *("folder", "--data", str(folder), "--model", "test_resnet", "--size", "32", "--device", "cpu"),
        *("--images-per-step", "8", "--steps", "10", "--workers", "0", "--tracker", "none"),
    ]
    for name, more in (("held", []), ("streamed", ["--stream"])):
        assert command.main([*arguments, "--output", str(tmp_path / name), *more]) == 0
        told = capsys.readouterr().err
        assert f"skipped 3 broken images: {broken[0]}, {broken[1]}, " in told
    assert same(weights(tmp_path / "held"), weights(tmp_path / "streamed"))
    assert RECIPES["folder"].model == "resnet18"
