"""A repository on the Hub is what timm, transformers and the Hub itself expect: its card, configuration and ONNX."""

import json
import os
import re
import subprocess
import sys

import onnxruntime
import pytest
import timm
import torch
from conftest import HUB_ENVIRONMENT, ROOT, SAMPLES
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import nn

from rotation_ssl.convert import Converted, write_folder
from training.export import onnx_file
from training.reporting import publish
from training.reporting.hub import card

NAME = "rotnet_nin.cifar10"
REPOSITORY = f"ORG/{NAME}"
pytestmark = [
    pytest.mark.usefixtures("public_address"),
    # the Hub's client, with its own HTTP library
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


def publish_files(hub, repository, *arguments):
    assert publish.main(["upload", "--namespace", "ORG", *map(str, arguments)]) == 0
    return hub.repositories[repository]["commits"][hub.repositories[repository]["main"]]


def run_python(code, folder, home):
    """Run code as a reader of the card would, in a process of its own, against the loopback Hub."""
    environment = {**os.environ, **HUB_ENVIRONMENT, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def folder_with_photo(tmp_path):
    (tmp_path / "photo.jpg").write_bytes((SAMPLES / "photos" / "astronaut.jpg").read_bytes())
    return tmp_path


@pytest.mark.slow
def test_every_snippet_of_the_card_runs(hub, weights_dir, folder_with_photo, tmp_path):
    text = publish_files(hub, REPOSITORY, "--weights", NAME)["README.md"].decode()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 5
    ran = [snippet for snippet in snippets if "torch.hub.load" not in snippet]
    code = "\n".join(ran) + "\nprint(tuple(probabilities.shape), tuple(embedding.shape))"
    out = run_python(code, folder_with_photo, tmp_path / "home")
    assert "(1, 4) (1, 192)" in out
    shapes = re.findall(r"    # ([\w.]+: \(.*\))", text)
    assert len(shapes) == 4 and all(shape in out for shape in shapes)
    assert all(label in out for label in ("upright", "90° ccw", "180°", "90° cw"))


@pytest.mark.usefixtures("export_once")
def test_the_card_opens_with_the_import(hub, weights_dir):
    text = publish_files(hub, REPOSITORY, "--weights", NAME)["README.md"].decode()
    _, _, body = text.split("---\n", 2)
    title, first = [line for line in body.splitlines() if line][:2]
    assert title == f"# Model card for {NAME}" and first.startswith("Run `import rotation_ssl` first")


def test_model_stats_of_a_network_counted_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 6 * 6, 7))
    parameters, activations = 5 * 27 + 180 * 7 + 7, 5 * 36 + 7
    assert card.model_stats(network, (3, 8, 8)) == (parameters, 36 * 5 * 27 + 180 * 7, activations)


@pytest.mark.usefixtures("export_once")
@pytest.mark.parametrize("name", [NAME, "rotnet_alexnet.photos"])
def test_onnx_gives_the_logits_of_the_model(hub, weights_dir, name):
    files = publish_files(hub, f"ORG/{name}", "--weights", name)
    session = onnxruntime.InferenceSession(files["onnx/model.onnx"], providers=["CPUExecutionProvider"])
    golden = load(files["golden.safetensors"])
    (logits,) = session.run(["logits"], {"images": golden["input"].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), golden["logits"], rtol=1e-3, atol=1e-3)
    images = torch.randn(3, *golden["input"].shape[1:])
    assert session.run(None, {"images": images.numpy()})[0].shape == (3, 4)
    assert str(ROOT).encode() not in files["onnx/model.onnx"]


def test_the_same_network_gives_the_same_onnx_file():
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 6 * 6, 4)).eval()
    first, again = (onnx_file(network, torch.zeros(2, 3, 8, 8), "images", ["logits"]) for _ in range(2))
    assert first == again


@pytest.mark.usefixtures("export_once")
def test_labels_and_metadata(hub, weights_dir):
    files = publish_files(hub, REPOSITORY, "--weights", NAME)
    assert json.loads(files["config.json"])["label_names"] == ["upright", "90° ccw", "180°", "90° cw"]
    (weights_dir / "backbone.safetensors").write_bytes(files["backbone.safetensors"])
    with safe_open(weights_dir / "backbone.safetensors", "pt") as file:
        told = file.metadata()
    entry = json.loads((weights_dir / "manifest.json").read_text())[NAME]
    assert told == {
        "format": "pt",
        "tag": NAME,
        "recipe": entry["recipe"],
        "commit": entry["commit"],
        "license": "mit",
        "layer": "block2",
    }


@pytest.mark.slow
def test_timm_alone_loads_a_resnet(hub, weights_dir, tmp_path):
    state = timm.create_model("rotnet_resnet18").state_dict()
    write_folder(Converted("rotnet_resnet18", 4, state, "a test"), tmp_path / "resnet", "mine", {})
    options = ("--license", "mit", "--trained-on", "CIFAR-100", "--layer", "layer3")
    text = publish_files(hub, "ORG/rotnet_resnet18.mine", "--weights", tmp_path / "resnet", *options)["README.md"]
    assert b"These weights load with timm alone" in text and b"import rotation_ssl\n" not in text
    assert b"cifar10" not in text.split(b"---\n")[1], "another data set"
    code = (
        "import sys, timm, safetensors.torch\n"
        "model = timm.create_model('hf-hub:ORG/rotnet_resnet18.mine@v0.1', pretrained=True)\n"
        "assert 'rotation_ssl' not in sys.modules and type(model).__module__ == 'timm.models.resnet'\n"
        "safetensors.torch.save_file(model.state_dict(), 'loaded.safetensors')\n"
        "from transformers import AutoModel\n"
        "features = AutoModel.from_pretrained('ORG/rotnet_resnet18.mine')\n"
    )
    run_python(code, tmp_path, tmp_path / "home")
    loaded = load_file(tmp_path / "loaded.safetensors")
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.usefixtures("export_once")
@pytest.mark.parametrize(
    ("metadata", "status", "message"),
    [("model-index: [{name: x, results: [{task: 1}]}]", 200, "Invalid `model_index`"), ("license: no", 400, "as told")],
)
def test_a_refused_card_is_an_error_before_anything_is_created(
    hub, weights_dir, monkeypatch, capsys, metadata, status, message
):
    monkeypatch.setattr(card, "_card_data", lambda name, entry: metadata)
    if status == 400:
        hub.answer("POST", "validate-yaml", status)
    assert publish.main(["upload", "--namespace", "ORG", "--weights", NAME]) == 2
    error = capsys.readouterr().err
    assert f"the Hub refuses the card of {REPOSITORY}" in error and message in error and error.count("\n") == 1
    assert not hub.repositories and not hub.uploads


@pytest.mark.slow
def test_an_onnx_file_of_another_exporter_is_kept(hub, weights_dir):
    files = publish_files(hub, REPOSITORY, "--weights", NAME)
    hub.commit(REPOSITORY, {"onnx/model.onnx": files["onnx/model.onnx"] + b"\xba\x06\x03abc"})  # an unknown field
    again = publish_files(hub, REPOSITORY, "--weights", NAME, "--version", "v0.2")
    assert again["onnx/model.onnx"].endswith(b"abc")
