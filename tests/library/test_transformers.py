"""Folders of weights as transformers' TimmWrapper takes them, with config.json as timm itself writes it."""

import json
from functools import partial

import pytest
import timm
import torch
import transformers
from conftest import ARCHIVE
from safetensors.torch import load_file
from timm.models._hub import save_for_hf

from rotation_ssl.convert import Converted, convert, read_checkpoint, write_folder
from rotation_ssl.pretraining.outputs import write_run
from training.recipes import NIN_CIFAR10_CPU
from training.reporting.hub import files
from training.reporting.hub.weights import upload_of
from training.reporting.rows import read_rows


def converted_alexnet(num_classes):
    network = timm.create_model("rotnet_alexnet", fc_size=0, num_classes=num_classes)
    return Converted("rotnet_alexnet", num_classes, network.state_dict(), "VISSL", {"fc_size": 0})


def train(folder):
    """What a finished run leaves."""
    folder.mkdir()
    run = {"recipe": {"name": "tiny"}, "commit": "none", "rotated_images": 4, "curve": [{"step": 1, "loss": 1.4}]}
    write_run(folder, NIN_CIFAR10_CPU, run, timm.create_model("rotnet_nin"))


def publish(weights, folder):
    """What a repository of the Hub holds."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "onnx_file", lambda *_: b"")  # which these tests do not read
        written = files.hub_files(upload_of(weights), "ORG/x", "v0.1", read_rows())
    for name, content in written.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


FOLDERS = {
    "authors": lambda folder: write_folder(convert(read_checkpoint(ARCHIVE)), folder, "gidaris", {}),
    "without fc layers": lambda folder: write_folder(converted_alexnet(4), folder, "vissl", {}),
    "without a head": lambda folder: write_folder(converted_alexnet(0), folder, "vissl", {}),
    "trained": train,
    "published": partial(publish, "rotnet_nin.cifar10"),
    "published in half precision": partial(publish, "rotnet_alexnet.orientation"),
}


@pytest.fixture(params=FOLDERS, scope="module")
def folder(request, tmp_path_factory):
    """A folder of each kind, which the tests only read."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "folder"
    FOLDERS[request.param](folder)
    return folder


def test_the_arguments_that_transformers_gives_timm(folder):
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    model.load_state_dict(load_file(folder / "model.safetensors"))


def test_config_is_timms_own_but_for_the_argument_given_twice(folder, tmp_path):
    ours = json.loads((folder / "config.json").read_text())
    save_for_hf(timm.create_model(f"local-dir:{folder}", pretrained=True), tmp_path / "timm")
    timms = json.loads((tmp_path / "timm" / "config.json").read_text())
    added = {"sha256", "size", "provenance"} | ({"label_names", "dtype"} & ours.keys())
    assert ours.keys() - timms.keys() == added and timms.keys() <= ours.keys()
    assert timms["model_args"] == {**ours["model_args"], "num_classes": ours["num_classes"]}
    for key in ("architecture", "num_classes", "num_features", "global_pool"):
        assert ours[key] == timms[key]


def test_transformers_itself(folder):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
    with torch.inference_mode():
        features = transformers.TimmWrapperModel.from_pretrained(folder).eval()(x)
        assert features.last_hidden_state.equal(model.forward_features(x))
        if model.num_classes:
            wrapper = transformers.TimmWrapperForImageClassification.from_pretrained(folder).eval()
            assert wrapper(x).logits.equal(model(x))
