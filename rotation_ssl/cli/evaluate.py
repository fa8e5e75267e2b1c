"""rotation-ssl evaluate."""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from tqdm import tqdm

from rotation_ssl.cli.options import add_command, add_device, add_precision_argument, positive
from rotation_ssl.evaluation.frozen import Frozen
from rotation_ssl.evaluation.measure import measure_features, measure_rotation, plan
from rotation_ssl.evaluation.protocols import PROTOCOLS
from rotation_ssl.evaluation.report import Reported, new_figure, reported, write_report
from rotation_ssl.features import layer_modules
from rotation_ssl.labelled import LabelledSplits, check_same_classes, labelled_files, load_folder_split, split_folder
from rotation_ssl.machine import check_memory
from rotation_ssl.messages import first_line, some
from rotation_ssl.models import load_model
from rotation_ssl.precision import resolve_precision, warn_if_emulated

DETAILS = """

FOLDER holds train/<class>/* and test/<class>/* (or val/). One pass through the frozen backbone gives the features for
k-NN, linear and non-linear probes, another those for convolutional probes. The linear probe's L2 penalty is chosen on
the last tenth of the training images; nothing is chosen on the test images. Each number is printed and written to
report.md, report.json and report.png in --output when it is measured.
"""


def add(commands: Any) -> None:
    """Add the command."""
    text = "evaluate every layer with k-NN and probes on labelled images"
    added = add_command(commands, "evaluate", run, text, DETAILS, as_json=False)
    added.add_argument("model", metavar="MODEL", help="timm name: model, model.tag, hf-hub:... or local-dir:...")
    added.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder of labelled images")
    added.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the report")
    added.add_argument(
        "--only", nargs="+", choices=PROTOCOLS, help="what to measure [all; rotation requires a network with 4 outputs]"
    )
    added.add_argument("--layers", nargs="+", metavar="LAYER", help="layers to probe [all feature layers]")
    added.add_argument("--size", type=positive, help="input size of the backbone in pixels [the model's own]")
    add_precision_argument(added, "auto")
    add_device(added)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if (args.output / "report.json").exists():
        raise ValueError(f"{args.output} already contains a report: give another --output")
    if args.layers and args.only == ["rotation"]:
        raise ValueError("--layers is for k-NN and probes, not for rotation accuracy: leave it out")
    new_figure()  # refused before the work where it cannot be drawn
    model = load_model(args.model, args.device).eval().to(memory_format=torch.channels_last)
    warn_if_emulated(args.precision, args.device)
    precision = resolve_precision(args.precision or "auto", args.device)
    size = args.size or resolve_model_data_config(model)["input_size"][-1]
    frozen = Frozen(model, size, args.device, precision)
    layers = args.layers or list(layer_modules(model))
    unknown = [layer for layer in layers if layer not in layer_modules(model)]
    if unknown:
        raise ValueError(f"no layer {some(unknown)} in {args.model}; it has {some(list(layer_modules(model)))}")
    try:
        frozen.whole_maps(layers)(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{args.model} does not take images of {size} pixels ({first_line(error)})") from error
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"{args.output} is not a folder: give another --output")
    _check_memory(args.data, size)
    train, test = (load_folder_split(args.data, split, size) for split in ("train", "test"))
    check_same_classes(train.classes, test.classes)
    images = LabelledSplits(args.data.resolve().name, train, test)
    wanted = args.only or [name for name in PROTOCOLS if name != "rotation" or model.num_classes == 4]
    measurements = plan(layers, wanted, "cached", [0])
    numbers = measure_features(frozen, images, measurements, precision=precision)
    if "rotation" in wanted:
        # measured as it is asked for: what does not fit has been refused before
        numbers = itertools.chain((measure_rotation(frozen, split) for split in [test]), numbers)
    results: list[Reported] = []
    for number in numbers:
        result = reported(number, args.model, images.name)
        of = " ".join(part for part in (result.title, result.layer) if part)
        tqdm.write(f"  {of}: {100 * result.value:.2f} % ({result.correct:,} of {result.n:,}, {result.seconds:.0f} s)")
        results.append(result)
        write_report(args.output, results)
    print(f"the report is in {args.output}: report.md, report.json, report.png")
    return 0


def _check_memory(root: Path, size: int) -> None:
    """Refuse images that do not fit into memory, before they are read."""
    count = sum(len(labelled_files(split_folder(root, split))[0]) for split in ("train", "test"))
    check_memory(count * 3 * size**2, f"{count:,} images of {size} pixels", "give fewer images, or a smaller --size")
