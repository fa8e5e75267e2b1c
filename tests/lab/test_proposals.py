"""Selective search on a small VOCdevkit: it finds the objects, and goes on after it was killed."""

import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_voc import write_small_voc

from training.transfer import selective_search as search
from training.transfer.data import read_annotations
from training.transfer.proposals import check_proposals_file

cv2 = pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return write_small_voc(tmp_path_factory.mktemp("voc"), train=10, test=6)


def run(*arguments):
    return search.main([str(argument) for argument in arguments])


def test_the_command_finds_the_objects(devkit, tmp_path, capsys):
    file = tmp_path / "regions.safetensors"
    arguments = ("--data", devkit, "--output", file, "--workers", 0)
    assert run(*arguments) == 0
    told = capsys.readouterr().out
    assert "16 images" in told and "recall at 0.5 IoU" in told and not (tmp_path / "regions.safetensors.parts").exists()
    images = [image for split in ("trainval", "test") for image in read_annotations(devkit, "2007", split)]
    check_proposals_file(file, images)
    regions = load_file(file)
    assert search.recall(images, regions) > 0.5 > search.recall(images, regions, 1)
    with safe_open(file, framework="pt") as opened:
        assert '"scale": 250' in opened.metadata()["settings"]
    # a finished file is not written over
    assert run(*arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_regions_are_inside_and_in_order_and_always_the_same():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 4, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy()).resize((321, 203))
    boxes = search.selective_search(image, seed=3)
    assert len(boxes) > 5 and (boxes >= 0).all() and (boxes <= torch.tensor([321, 203, 321, 203])).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert torch.equal(search.selective_search(image, most=4, seed=3), boxes[:4])
    # an image of one colour, and one too narrow to scale, are regions themselves
    for size in ((40, 30), (1, 900)):
        boxes = search.selective_search(Image.new("RGB", size))
        assert [0, 0, *size] in boxes.tolist()


def test_the_command_keeps_the_first_regions(devkit, tmp_path):
    arguments = ("--data", devkit, "--workers", 0, "--split", "val", "--output")
    for name, most in (("all", 2000), ("some", 3)):
        assert run(*arguments, tmp_path / f"{name}.safetensors", "--most", most) == 0
    every, some = (load_file(tmp_path / f"{name}.safetensors") for name in ("all", "some"))
    assert len(some) == 5 and all(len(every[name]) > 3 and torch.equal(some[name], every[name][:3]) for name in some)
    assert run(*arguments, tmp_path / "none.safetensors", "--most", 0) == 2


def test_recall_by_hand(devkit):
    image = read_annotations(devkit, "2007", "train")[0]
    image.difficult[:] = False
    far, near = torch.tensor([[0.0, 0, 1, 1]]), image.boxes[:1]
    assert search.recall([image], {image.name: far}) == 0
    assert search.recall([image], {image.name: torch.cat([far, near])}) == 1 / len(image.boxes)
    assert search.recall([image], {image.name: torch.cat([far, near])}, first=1) == 0


def test_a_killed_search_goes_on(devkit, tmp_path, monkeypatch):
    """Killed in its third part: finished parts are used as they are, and only the other images are searched."""
    monkeypatch.setattr(search, "PART", 2)
    images = read_annotations(devkit, "2007", "trainval")
    file = tmp_path / "killed.safetensors"
    code = (
        "import os, signal; from training.transfer import selective_search as search\n"
        "search.PART = 2\n"
        "found, calls = search.selective_search, []\n"
        "def fifth_kills(*args):\n"
        "    calls.append(args)\n"
        "    if len(calls) == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return found(*args)\n"
        "search.selective_search = fifth_kills\n"
        f"search.main(['--data', {str(devkit)!r}, '--split', 'trainval', '--output', {str(file)!r}, '--workers', '0'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    assert process.wait() == -signal.SIGKILL and not file.exists()
    parts = tmp_path / "killed.safetensors.parts"
    kept = [load_file(part) for part in sorted(parts.glob("*.safetensors"))]
    names = [image.name for image in images]
    assert [sorted(part) for part in kept] == [names[:2], names[2:4]]
    searched = []
    original = search.selective_search
    monkeypatch.setattr(search, "selective_search", lambda *args: searched.append(args) or original(*args))
    found = search.search_images(images, file)
    assert len(searched) == len(images) - 4
    assert all(torch.equal(found[name], part[name]) for part in kept for name in part)
    assert set(found) == set(load_file(file)) == {image.name for image in images} and not parts.exists()


def test_a_damaged_part_is_searched_again(devkit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "PART", 4)
    images = read_annotations(devkit, "2007", "trainval")
    monkeypatch.setattr(search.shutil, "rmtree", lambda folder: None)
    search.search_images(images, tmp_path / "one.safetensors")
    parts = sorted((tmp_path / "one.safetensors.parts").iterdir())
    assert len(parts) == 3
    parts[1].write_bytes(parts[1].read_bytes()[:-10])
    (tmp_path / "one.safetensors").rename(tmp_path / "before.safetensors")
    search.search_images(images, tmp_path / "one.safetensors")
    assert f"{parts[1]} is damaged" in capsys.readouterr().out
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()
    # parts of other settings are never mixed in
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(ValueError, match="is of other images or settings"):
        search.search_images(images, tmp_path / "one.safetensors", scale=100)


def test_what_is_wrong_is_said(devkit, tmp_path, capsys, monkeypatch):
    arguments = ("--data", devkit, "--output", tmp_path / "x.safetensors", "--workers", 0)
    for wrong, message in (
        (("--split", "none"), "there are the splits"),
        (("--scale", 0), "must be at least 1"),
    ):
        assert run(*arguments, *wrong) == 2
        assert message in capsys.readouterr().err
    image = read_annotations(devkit, "2007", "test")[0]
    far = tmp_path / "far.safetensors"
    save_file({image.name: torch.tensor([[0.0, 0, 500, 500]])}, far)
    with pytest.raises(ValueError, match=f"{image.name} in .* are outside of its 160 x 128 pixels"):
        check_proposals_file(far, [image])
    search._opencv.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert run(*arguments) == 2
    assert "pip install -e '.[voc]'" in capsys.readouterr().err
    search._opencv.cache_clear()
