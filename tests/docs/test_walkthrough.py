"""docs/pretraining.md, done: its commands and its code, on the sample images and a small backbone."""

import re
import shlex

import timm
from conftest import ROOT

from rotation_ssl import cli
from training import pretrain
from training.evaluation import probes as evaluate

PAGE = (ROOT / "docs" / "pretraining.md").read_text()


def options_of(command):
    """The command's arguments, without `python -m training X`."""
    return shlex.split(command)[4:]


def test_the_walk_through(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MY_IMAGES").symlink_to(small_cifar10 / "train")
    (tmp_path / "MY_LABELLED").symlink_to(small_cifar10)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    commands = re.findall(r"^python -m training.*$", PAGE, re.MULTILINE)
    assert len(commands) == 2
    # smaller, to take seconds: the same command otherwise
    small = ["--size", "32", "--images-per-step", "8", "--steps", "4", "--workers", "0", "--device", "cpu"]
    assert pretrain.main([*options_of(commands[0]), *small]) == 0
    model = timm.create_model("local-dir:runs/mine", pretrained=True)
    assert model.num_classes == 4 and model.pretrained_cfg["architecture"] == "resnet18"
    probes = ["--only", "knn", "--layers", "layer2", "--size", "32", "--output", str(tmp_path / "probes")]
    assert evaluate.main([*options_of(commands[1]), *probes]) == 0
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "docs/pretraining.md", "exec"), {})
    assert (tmp_path / "neighbours.png").stat().st_size > 0 and (tmp_path / "fine-tuned.pt").stat().st_size > 0
    features = re.search(r"`rotation-ssl (features [^`]*)`", PAGE)[1]
    assert cli.main(shlex.split(features)) == 0


def test_every_option_of_the_page_exists():
    told = pretrain.build_parser().format_help()
    for option in set(re.findall(r"`(--[a-z-]+)", PAGE)):
        assert option in told, option
