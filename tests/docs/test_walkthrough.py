"""docs/pretraining.md, done: its commands and its code, on the sample images and a small backbone."""

import re
import shlex

import pytest
import timm
from conftest import ROOT

from rotation_ssl import cli

PAGE = (ROOT / "docs" / "pretraining.md").read_text()


def test_the_walk_through(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MY_IMAGES").symlink_to(small_cifar10 / "train")
    (tmp_path / "MY_LABELLED").symlink_to(small_cifar10)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pretrain, evaluate = (shlex.split(line)[1:] for line in re.findall(r"^rotation-ssl .*$", PAGE, re.MULTILINE))
    # smaller, to take seconds: the same command otherwise
    small = ["--size", "32", "--images-per-step", "8", "--steps", "4", "--workers", "0", "--device", "cpu"]
    assert cli.main([*pretrain, *small]) == 0
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


def test_every_option_of_the_page_exists(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    told = capsys.readouterr().out
    for option in set(re.findall(r"`(--[a-z-]+)", PAGE)):
        assert option in told, option
