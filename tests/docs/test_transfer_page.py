"""docs/transfer.md, done: its commands and its code, on a small VOCdevkit and small fc layers."""

import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from scipy.io import savemat
from small_voc import write_small_voc

from training.__main__ import main
from training.reporting.rows import read_rows
from training.reporting.transfers import transfer_lines
from training.transfer.data import CLASSES, read_annotations

PAGE = (ROOT / "docs" / "transfer.md").read_text()
SMALL = {"voc": ["--size", "64"], "detect": ["--side", "128"], "segment": []}
PUBLISHED = ("rotnet_alexnet.gidaris_in1k", "rotnet_alexnet.photos")


def run(command):
    """A command of the page, in seconds: random weights in place of published ones, the same otherwise."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "training"]
    if words[3] == "proposals":
        assert main([*words[3:], "--workers", "0"]) == 0
        return words[-1]
    assert words[4] in PUBLISHED
    shorter = ["--random", "--fc-size", "8", "--steps", "1", "--images-per-step", "1", "--workers", "0"]
    shorter += ["--device", "cpu"]
    assert main([words[3], "rotnet_alexnet", *words[5:], *shorter, *SMALL[words[3]]]) == 0
    return words[words.index("--output") + 1]


@pytest.mark.slow
def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    devkit = write_small_voc(tmp_path, train=4, test=2)
    lists = devkit / "VOC2007" / "ImageSets" / "Segmentation"
    shutil.copytree(devkit / "VOC2007", devkit / "VOC2012")
    write_own_data(devkit, tmp_path / "MY_DATA")
    for split in ("trainval", "test"):
        names = (lists / f"{split}.txt").read_text().split()
        images, boxes = np.empty((len(names), 1), dtype=object), np.empty((1, len(names)), dtype=object)
        for index, name in enumerate(names):
            images[index, 0] = np.array([name])
            boxes[0, index] = np.array([[1, 1, 128, 160], [11, 21, 100, 150]], dtype=np.uint16)
        savemat(tmp_path / f"voc_2007_{split}.mat", {"images": images, "boxes": boxes})
    shutil.copy(next((devkit / "VOC2007" / "JPEGImages").iterdir()), tmp_path / "picture.jpg")
    commands = re.findall(r"^python -m .*$", PAGE, re.MULTILINE)
    selective_search, find, call = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(commands) == 13
    execute(selective_search)
    with safe_open("selective-search.safetensors", framework="pt") as file:
        assert file.get_tensor("000001").tolist() == [[0, 0, 160, 128], [20, 10, 150, 100]]
    outputs = [run(command) for command in commands]
    regions, *trainings = outputs
    assert (tmp_path / regions).is_file() and len(set(trainings)) == 12
    assert all((tmp_path / output / "report.md").exists() for output in trainings)
    told = execute(find.replace("fc_size=4096", "fc_size=8"))["found"]
    assert set(told) == {"boxes", "labels", "scores"}
    classes = execute(call.replace("fc_size=4096", "fc_size=8"))["classes"]
    assert classes.shape == (128, 160) and set(classes.unique().tolist()) <= {0, 1, 2}


def execute(snippet):
    names = {}
    exec(compile(snippet, "docs/transfer.md", "exec"), names)
    return names


def write_own_data(devkit, folder):
    """The small VOCdevkit with two classes of one's own."""
    shutil.copytree(devkit / "VOC2007", folder / "VOCdevkit" / "VOC2007")
    for file in (folder / "VOCdevkit" / "VOC2007" / "Annotations").iterdir():
        file.write_text(file.read_text().replace("aeroplane", "gull").replace("<name>car<", "<name>ship<"))
    for file in (folder / "VOCdevkit" / "VOC2007" / "SegmentationClass").iterdir():
        mask = np.array(Image.open(file))
        mask[mask == CLASSES.index("aeroplane") + 1], mask[mask == CLASSES.index("car") + 1] = 1, 2
        Image.fromarray(mask).save(file)
    assert read_annotations(folder, "2007", "test", ("gull", "ship"))


def test_the_papers_numbers_are_those_of_the_rows():
    assert transfer_lines(read_rows()) in PAGE, "again: python -m training publish render"
    quoted = {(row.weights, row.layer): row.value for row in read_rows() if "voc-classification" in row.protocol}
    assert quoted["rotnet_alexnet.paper", "fc6-8"] == 0.7087 and quoted["rotnet_alexnet.paper", "all"] == 0.7297
    (boxes,) = [r.value for r in read_rows() if r.weights == "rotnet_alexnet.paper" and "voc-fast-rcnn" in r.protocol]
    assert boxes == 0.544


@pytest.mark.parametrize("name", SMALL)
def test_what_the_page_says_of_all_commands_holds(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    told = capsys.readouterr().out
    everywhere = set(re.findall(r"`(--[a-z-]+)", PAGE)) - {
        "--model",
        "--side",
        "--proposals",
        "--layers",
        "--pictures",
        "--only",
    }
    assert all(option in told for option in everywhere), everywhere
