"""What is computed in bf16, and where: 'auto' follows the hardware, no row says 'auto', no run changes it midway."""

import dataclasses
import json
import re
import signal

import pytest
import torch
from conftest import shorten_probes
from tiny_runs import TINY, interrupt, sample_images

from rotation_ssl import precision
from rotation_ssl.evaluation import frozen
from rotation_ssl.evaluation.protocols import PROTOCOLS
from rotation_ssl.precision import cpu_flags, resolve_precision, resolved, supports_bfloat16, warn_if_emulated
from rotation_ssl.pretraining.loop import pretrain
from rotation_ssl.pretraining.setup import create_accelerator
from training.evaluation import finetune
from training.evaluation import layers as imagenet
from training.evaluation import probes as evaluate
from training.evaluation.labelled import open_labelled, read_into_memory
from training.evaluation.recipes import FINETUNES, LAYER_PROBES
from training.evaluation.subject import load_subject
from training.recipes import RECIPES
from training.studies.nin_cifar10 import VARIANTS

EVERY = [
    *RECIPES.values(),
    *VARIANTS.values(),
    *(recipe for protocol in PROTOCOLS.values() for recipe in protocol.recipes.values() if recipe),
    *FINETUNES.values(),
    *LAYER_PROBES.values(),
]
NATIVE = pytest.mark.parametrize(("flags", "computed"), [(set(), "fp32"), ({"avx512_bf16"}, "bf16")])


@pytest.fixture
def set_flags(monkeypatch):
    """A function that gives the processor other instruction sets."""
    return lambda flags: monkeypatch.setattr(precision, "cpu_flags", lambda: flags)


@pytest.mark.parametrize(
    ("text", "native"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\nbugs\t\t: spectre_v1\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx512f avx512_vnni\n", False),
        ("model name\t: a processor with bf16\nflags\t\t: fpu\n", False),
        (None, False),
    ],
    ids=["x86", "amx", "arm", "none", "elsewhere", "no file"],
)
def test_a_processor_says_what_it_multiplies(tmp_path, set_flags, text, native):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    set_flags(cpu_flags(file))
    assert supports_bfloat16("cpu") is native
    assert resolve_precision("auto", "cpu") == ("bf16" if native else "fp32")
    assert supports_bfloat16("meta") is False, "neither a processor nor a GPU of CUDA's"
    for given in ("fp32", "bf16", "fp16"):
        assert resolve_precision(given, "cpu") == given, "what is asked for is obeyed"


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_is_asked_without_its_emulation(monkeypatch, native):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or native)
    assert supports_bfloat16("cuda:0") is native and asked == [{"including_emulation": False}]


@pytest.mark.parametrize("recipe", EVERY, ids=lambda r: getattr(r, "name", None) or "probe")
def test_no_recipe_emulates_bfloat16(recipe, set_flags):
    set_flags(set())
    assert resolved(recipe, "cpu").precision == "fp32"
    set_flags({"amx_bf16"})
    assert resolved(recipe, "cpu").precision == ("bf16" if recipe.precision == "auto" else "fp32")


def test_whoever_asks_for_emulation_is_told(set_flags, capsys):
    told = "cpu has no known bfloat16 instructions: bf16 may be many times slower than fp32\n"
    for given, flags in (("bf16", set()), ("bf16", {"avx512_bf16"}), ("auto", set()), ("fp32", set()), (None, set())):
        set_flags(flags)
        warn_if_emulated(given, "cpu")
        assert capsys.readouterr().err == (told if given == "bf16" and not flags else "")


@NATIVE
def test_rows_of_transfers_say_it(images, set_flags, flags, computed):
    set_flags(flags)
    recipe = dataclasses.replace(FINETUNES["few-labels-cpu"], images=32, batch_size=16)
    subject = load_subject("test_resnet", random=True, size=32)
    row = finetune.measure_finetuned(recipe, subject, "layer1", images)
    training = f"32 crops seen, convolutional classifier, frozen backbone, {computed}"
    assert re.fullmatch(rf"{training}, training accuracy \d+\.\d %", row.settings)


@NATIVE
def test_rows_of_layer_probes_say_it(small_tinyimagenet, set_flags, flags, computed):
    set_flags(flags)
    recipe = dataclasses.replace(LAYER_PROBES["imagenet-linear-cpu"], epochs=1, milestones=(), batch_size=10)
    data = read_into_memory(open_labelled("tinyimagenet", small_tinyimagenet, "train", 64), 0)
    subject = load_subject("test_resnet", random=True, size=64)
    (row,) = imagenet.measure_layers(recipe, subject, ["layer1"], data, data, "x val")
    assert row.settings.endswith(f"batch norm, linear; 1 epoch of SGD, 64 pixels, {computed}")


@NATIVE
def test_rows_of_probes_say_it(images, set_flags, monkeypatch, flags, computed):
    set_flags(flags)
    shorten_probes(monkeypatch, epochs=2, milestones=(), batch_size=8)
    subject = load_subject("test_resnet", random=True, size=32)

    def settings(protocol, budget="cached", **options):
        measurement = evaluate.Measurement(protocol, budget, "layer1", 0)
        (row,) = evaluate.measure_features(subject, images, [measurement], **options)
        return row.settings

    assert settings("conv").endswith(f"2 views, 2 epochs of SGD in {computed}")
    assert settings("nonlinear").endswith("4 views, 2 epochs of SGD in fp32"), "its recipe's"
    fresh = f"every epoch, 2 epochs of SGD, network and probe in {computed}"
    assert settings("nonlinear", "paper").endswith(fresh)
    assert settings("nonlinear", features="auto").endswith(f"SGD in fp32; features in {computed}")
    both = settings("nonlinear", "paper", features="auto", probes="auto")
    assert both.endswith(f"{fresh}; features in {computed}")
    assert settings("conv", probes="fp32").endswith("SGD in fp32"), "what is asked for is obeyed"


@pytest.mark.parametrize("command", [finetune, imagenet])
def test_what_the_device_would_take_anyway_is_the_recipe_as_it_is(
    command, small_cifar10, set_flags, monkeypatch, tmp_path, capsys
):
    """The card takes rows of either precision, but none that a command line chose."""
    set_flags(set())
    monkeypatch.setattr("training.reporting.rows.current_commit", lambda: "0" * 40)
    recipe, model = {finetune: ("few-labels-cpu", "rotnet_nin"), imagenet: ("imagenet-linear-cpu", "rotnet_alexnet")}[
        command
    ]
    arguments = [recipe, model, "--data", str(small_cifar10), "--dataset", "cifar10", "--record"]
    for given, message in (
        ("fp32", "this is not the whole of CIFAR-10"),
        ("auto", "this is not the whole of CIFAR-10"),
        ("bf16", "leave out what changes them"),
    ):
        assert command.main([*arguments, "--precision", given]) == 2
        assert message in capsys.readouterr().err


@NATIVE
def test_features_are_computed_in_what_the_row_says(images, set_flags, monkeypatch, flags, computed):
    set_flags(flags)
    seen = []
    extract = frozen.extract_features

    def watched(*args, **options):
        seen.append(options.get("autocast"))
        return extract(*args, **options)

    monkeypatch.setattr(frozen, "extract_features", watched)
    subject = load_subject("test_resnet", random=True, size=32)
    for features, expected in ((None, None), ("auto", precision.autocast_type(computed)), ("bf16", torch.bfloat16)):
        seen.clear()
        list(evaluate.measure_features(subject, images, evaluate.plan(["layer1"], ["knn"], "", []), features=features))
        # the last two are the training and the test images, others ask for shapes alone
        assert seen[-2:] == [expected, expected]


AUTO = dataclasses.replace(TINY, precision="auto")


def test_a_stopped_run_does_not_go_on_in_another_precision(tmp_path, monkeypatch, set_flags):
    set_flags(set())
    images, output = sample_images(), tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 11, lambda: signal.raise_signal(signal.SIGTERM))
        pretrain(AUTO, images, output)
    set_flags({"avx512_bf16"})
    with pytest.raises(
        ValueError, match=r"is of another run \(precision 'fp32' -> 'bf16'\): resume with the same settings"
    ):
        pretrain(AUTO, images, output, resume=True)
    with pytest.raises(ValueError, match=r"another run \(precision 'fp32' -> 'bf16'\)"):
        pretrain(dataclasses.replace(AUTO, precision="bf16"), images, output, resume=True)
    # the same precision by its name, on whatever machine
    weights = pretrain(dataclasses.replace(AUTO, precision="fp32"), images, output, resume=True)
    assert json.loads((output / "run.json").read_text())["recipe"]["precision"] == "fp32"
    # nothing goes on in a finished run: 'auto' was what it was, but bf16 it was not
    assert pretrain(AUTO, images, output, resume=True) == weights
    with pytest.raises(ValueError, match=r"finished run of another recipe \(precision differ\)"):
        pretrain(dataclasses.replace(AUTO, precision="bf16"), images, output, resume=True)


@NATIVE
def test_accelerate_gets_the_resolved_precision(set_flags, flags, computed):
    set_flags(flags)
    assert create_accelerator(AUTO, cpu=True).mixed_precision == ("no" if computed == "fp32" else computed)
