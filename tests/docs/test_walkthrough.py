"""docs/pretraining.md, done: its commands and its code, on the sample images and a small backbone."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import timm
from conftest import ROOT

from rotation_ssl import cli

PAGE = (ROOT / "docs" / "pretraining.md").read_text()
# smaller, to take seconds: the same commands otherwise
SMALL = ["--size", "32", "--images-per-step", "8", "--steps", "4", "--workers", "0", "--device", "cpu"]


def test_the_walk_through(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MY_IMAGES").symlink_to(small_cifar10 / "train")
    (tmp_path / "MY_LABELLED").symlink_to(small_cifar10)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pretrain, _, evaluate = (shlex.split(line)[1:] for line in re.findall(r"^rotation-ssl .*$", PAGE, re.MULTILINE))
    assert cli.main([*pretrain, *SMALL]) == 0
    model = timm.create_model("local-dir:runs/mine", pretrained=True)
    assert model.num_classes == 4 and model.pretrained_cfg["architecture"] == "resnet18"
    assert cli.main([*evaluate, "--only", "knn", "--layers", "layer2", "--size", "32"]) == 0
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "docs/pretraining.md", "exec"), {})
    assert (tmp_path / "neighbours.png").stat().st_size > 0 and (tmp_path / "fine-tuned.pt").stat().st_size > 0
    features = re.search(r"`rotation-ssl (features [^`]*)`", PAGE)[1]
    assert cli.main(shlex.split(features)) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs GNU tar and coreutils")
def test_shards_are_made_and_read(small_cifar10, tmp_path, monkeypatch):
    """40 images in shards of 10."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MY_IMAGES").symlink_to(small_cifar10 / "train")
    (commands,) = (block for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if "tar -C" in block)
    commands = commands.replace("*.jpg", "*.png").replace("-l 5000", "-l 10")
    subprocess.run(["bash", "-euo", "pipefail", "-c", commands], check=True)
    _, pretrain, _ = (shlex.split(line)[1:] for line in re.findall(r"^rotation-ssl .*$", PAGE, re.MULTILINE))
    assert pretrain[2] == "shards/{000..255}.tar"
    pretrain[2] = "shards/{000..003}.tar"
    assert cli.main([*pretrain, *SMALL]) == 0
    run = json.loads((tmp_path / "runs" / "mine" / "run.json").read_text())
    assert run["images"].startswith("40 images in 4 files")


def test_every_option_of_the_page_exists(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    told = capsys.readouterr().out
    for option in set(re.findall(r"`(--[a-z-]+)", PAGE)) - {"--node-rank"}:  # torchrun's
        assert option in told, option
