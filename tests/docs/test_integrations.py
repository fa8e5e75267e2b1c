"""Exported and compiled, every model gives its own outputs; what docs/integrations.md tells people to type runs."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import DATA, MODELS, ROOT
from timm.data import resolve_model_data_config
from torch import nn

from rotation_ssl.convert import convert, read_checkpoint, write_folder

# AlexNet and the ResNets are made for 224 pixels; their convolutions take fewer, which is faster
SIZE = 64
# with fc layers at 224 pixels, where the pooling to 6 x 6 has nothing to do; narrow, for fc_size=4096 is 200 MB a file
WITH_FC = "rotnet_alexnet with fc layers"
OPTIONS = {"rotnet_nin": {"pretrained": True}, "rotnet_alexnet": {"fc_size": 0}}

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler"
)


def snippets():
    """The python block of each section of docs/integrations.md, under the section's name."""
    found = []
    for section in (ROOT / "docs" / "integrations.md").read_text().split("\n## ")[1:]:
        for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            marks = needs_compiler if "torch.compile" in code else ()
            found.append(pytest.param(code, id=section.split("\n", 1)[0], marks=marks))
    return found


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    made = {name: timm.create_model(name, **OPTIONS.get(name, {})) for name in MODELS}
    made[WITH_FC] = timm.create_model("rotnet_alexnet", fc_size=64)
    for name, model in made.items():
        if name != "rotnet_nin":
            draw_batch_norms(model)
    return {name: model.eval().requires_grad_(False) for name, model in made.items()}


def draw_batch_norms(model):
    """Fresh batch norms are the identity, and some of a ResNet's are zero: what folds them wrongly would not show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)


def images(models, name, count):
    size = resolve_model_data_config(models[name])["input_size"][-1]
    return torch.randn(count, 3, *[size if name == WITH_FC else min(size, SIZE)] * 2)


def assert_same(output, expected):
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", (*MODELS, WITH_FC))
def test_exported_program_takes_any_batch_size(models, name):
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(models[name], (images(models, name, 2),), dynamic_shapes=batch).module()
    for count in (1, 3):
        x = images(models, name, count)
        assert_same(program(x), models[name](x))


@pytest.mark.parametrize("name", (*MODELS, WITH_FC))
def test_onnx_file_takes_any_batch_size(models, name, tmp_path):
    file, batch = tmp_path / "model.onnx", ({0: torch.export.Dim("batch")},)
    torch.onnx.export(models[name], (images(models, name, 2),), file, dynamo=True, dynamic_shapes=batch, verbose=False)
    onnx.checker.check_model(file, full_check=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 2, 3):
        x = images(models, name, count)
        (output,) = session.run(None, {"x": x.numpy()})
        assert_same(torch.from_numpy(output), models[name](x))
    shutil.rmtree(tmp_path)  # of up to 90 MB, which pytest would keep for three runs


@needs_compiler
@pytest.mark.parametrize("name", MODELS)
def test_compiled_model_is_the_model(models, name):
    torch.compiler.reset()
    x = images(models, name, 2)
    # without a break in the graph: all of it is compiled
    assert_same(torch.compile(models[name], fullgraph=True)(x), models[name](x))


@pytest.mark.parametrize("code", snippets())
def test_docs(code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_folder(convert(read_checkpoint(DATA / "CIFAR10_RotNet_NIN4blocks.tar.gz")), Path("FOLDER"), "gidaris", {})
    exec(compile(code, "docs/integrations.md", "exec"), {})


@pytest.mark.parametrize("script", ["train.py", "validate.py"])
def test_a_script_of_timm_knows_the_models(script, tmp_path):
    page = (ROOT / "docs" / "integrations.md").read_text().replace("\\\n", "")
    (command,) = [shlex.split(line) for line in page.splitlines() if line.startswith("python -c") and script in line]
    # those of timm's repository, which timm's package does not have, find the model by its name too
    (tmp_path / script).write_text(
        "import sys, timm\n"
        "if __name__ == '__main__':\n"
        "    name = sys.argv[sys.argv.index('--model') + 1]\n"
        "    print(timm.create_model(name, pretrained=True).num_classes)\n"
    )
    run = subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "4\n"
