"""The tables of docs/imagenet.md and docs/transfer.md: the paper's numbers of AlexNet, and what they cost on a GPU.

    python -m training.studies.alexnet_costs

The numbers are of result rows. The costs are computed and not measured: multiplications and additions are counted on
tensors without content (torch.utils.flop_counter), forward once and backward twice as much; reading images, pooling
regions and suppressing boxes are not. Memory is weights, gradients, momentum and what the layers keep for the backward
pass, for the largest images; the framework's own comes on top.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rotation_ssl  # noqa: F401  registers the models with timm
from training.evaluation.layers import build_probes
from training.evaluation.subject import Subject
from training.protocols import (
    IMAGENET_LINEAR_PAPER,
    IMAGENET_NONLINEAR_PAPER,
    VOC_CLASSIFICATION,
    VOC_FAST_RCNN,
    VOC_FASTER_RCNN,
    VOC_SEGMENTATION,
    VocDetection,
)
from training.recipes import ALEXNET_IMAGENET_AUTHORS, ALEXNET_IMAGENET_PAPER, ALEXNET_PLACES205_PAPER, IMAGENET_IMAGES
from training.reporting.rows import Row, read_rows

RATE = 5e12  # operations a second: a quarter of the fp32 peak of an A100 (19.5e12)
TRAINVAL, TEST, SEGMENTATION_TEST = 5_011, 4_952, 1_449  # images of VOC2007's trainval and test, VOC2012's val
PICTURE = (375, 500)  # pixels of most VOC images
PROPOSALS = 2_000  # regions that selective search finds in an image
# the paper's rows: their weights in training/results/, and what they are called
PAPER = {
    "rotnet_alexnet.paper": "RotNet",
    "rotnet_alexnet.paper-supervised": "ImageNet labels",
    "rotnet_alexnet.paper-rescaled": "random weights, rescaled",
    "rotnet_alexnet.paper-random": "random weights",
}
LAYERS = tuple(f"conv{i}" for i in range(1, 6))


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass and the bytes that its layers give out."""

    operations: float
    kept: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.kept + other.kept)

    def __mul__(self, times: float) -> "Work":
        return Work(self.operations * times, self.kept * times)


def work_of(layers: nn.Module, *shape: int) -> Work:
    """The work of layers, without content, on an input of a shape."""
    kept = [0]
    kinds = (nn.Conv2d, nn.Linear, nn.MaxPool2d)
    for layer in layers.modules():
        if isinstance(layer, kinds):
            layer.register_forward_hook(lambda _, __, output: kept.append(output.numel() * 4))
    with FlopCounterMode(display=False) as counter:
        layers(torch.empty(shape, device="meta"))
    return Work(counter.get_total_flops(), sum(kept))


def paper_table(rows: Sequence[Row]) -> str:
    """The paper's numbers on PASCAL VOC, from result rows: a line for each weights, a column for each protocol."""
    quoted = [row for row in rows if row.weights in PAPER and row.protocol.startswith("PASCAL VOC")]
    columns = list(dict.fromkeys((row.protocol, row.layer) for row in quoted))
    titles = [f"{protocol.removeprefix('PASCAL VOC ')}, {layer}" for protocol, layer in columns]
    lines = [f"| _{quoted[0].source}_ | {' | '.join(titles)} |", f"|---|{'---|' * len(columns)}"]
    for weights, name in PAPER.items():
        own = {(row.protocol, row.layer): f"_{100 * row.value:.2f} %_" for row in quoted if row.weights == weights}
        lines.append(f"| _{name}_ | {' | '.join(own.get(column, '') for column in columns)} |")
    return "\n".join(lines) + "\n"


def layer_table(rows: Sequence[Row]) -> str:
    """The paper's numbers on ImageNet and Places205, from result rows: a column for each layer."""
    quoted = [row for row in rows if row.weights in PAPER and row.protocol.startswith("ImageNet")]
    quoted = [row for row in quoted if row.source.startswith("paper")]
    lines = [f"| _paper_ | pretrained | {' | '.join(LAYERS)} |", f"|---|---|{'---|' * len(LAYERS)}"]
    for key in dict.fromkeys((row.protocol, row.data, row.weights, row.settings) for row in quoted):
        own = [row for row in quoted if (row.protocol, row.data, row.weights, row.settings) == key]
        cells = {
            row.layer: f"_{100 * row.value:.1f} %_{' (unchecked)' if 'unchecked' in row.source else ''}" for row in own
        }
        where = f"{own[0].data.partition(' ')[0]}, {own[0].protocol.removeprefix('ImageNet ')}"
        table = own[0].source.rpartition(", ")[2]
        whose = own[0].settings or "by rotation"
        lines.append(f"| _{where} ({table})_ | _{whose}_ | {' | '.join(cells.get(layer, '') for layer in LAYERS)} |")
    return "\n".join(lines) + "\n"


def imagenet_cost_table() -> str:
    """A table: of pretraining and of the probes on ImageNet the operations, hours at :data:`RATE`, and memory."""
    lines = ["| what | images seen | operations an image | hours | GPU memory |", "|---|---|---|---|---|"]
    image, head = _parts(224, 224)
    for recipe in (ALEXNET_IMAGENET_PAPER, ALEXNET_IMAGENET_AUTHORS, ALEXNET_PLACES205_PAPER):
        step = recipe.images_per_step * len(recipe.rotations)
        work = (image + head) * step
        lines.append(
            _imagenet_line(
                f"`{recipe.name}`", recipe.rotated_images, 3 * (image + head).operations, _parameters(), work.kept
            )
        )
    model = timm.create_model("rotnet_alexnet", device="meta").eval()
    subject = Subject("rotnet_alexnet.random", "rotnet_alexnet", model, "", 224)
    for probe, layers in ((IMAGENET_LINEAR_PAPER, LAYERS), (IMAGENET_NONLINEAR_PAPER, ("conv4", "conv5"))):
        probes = build_probes(probe, subject, layers, classes=1000)
        maps = {"conv1": (64, 55), "conv2": (192, 27), "conv3": (384, 13), "conv4": (256, 13), "conv5": (256, 13)}
        trained = Work(0, 0)
        for layer in layers:
            channels, side = maps[layer]
            trained += work_of(probes[layer].eval(), 1, channels, side, side)
        parameters = sum(p.numel() for p in nn.ModuleList(probes.values()).parameters())
        lines.append(
            _imagenet_line(
                f"`{probe.name}`, {', '.join(layers)}",
                probe.epochs * IMAGENET_IMAGES,
                image.operations + 3 * trained.operations,
                parameters,
                (image + trained).kept * probe.batch_size,
            )
        )
    return "\n".join(lines) + "\n"


def cost_table() -> str:
    """A table: of each transfer the operations of a step, hours at :data:`RATE`, and memory."""
    lines = [
        "| transfer | steps of images | operations a step | training | test | GPU memory |",
        "|---|---|---|---|---|---|",
    ]
    recipe = VOC_CLASSIFICATION
    image, head = _parts(224, 224)
    one_test = (image + head).operations * recipe.test_crops * TEST
    count = recipe.training.images_per_step
    for layers, backward in (("fc6-8", head), ("all", image + head)):
        step = (image + head + backward * 2) * count
        kept = (image + head) * count
        lines.append(_line(f"classification, {layers}", recipe.training, step.operations, one_test, kept.kept))
    for name, detection, regions in (
        ("detection, Fast R-CNN", VOC_FAST_RCNN, PROPOSALS),
        ("detection, Faster R-CNN", VOC_FASTER_RCNN, 1_000),
    ):
        works = [_detection_work(detection, side, detection.regions) for side in detection.train_sides]
        mean = sum(work.operations for work in works) / len(works)
        count = detection.training.images_per_step
        one_test = _detection_work(detection, detection.test_side, regions).operations * TEST
        largest = max(work.kept for work in works) * count
        lines.append(_line(name, detection.training, 3 * mean * count, one_test, largest))
    segmentation = VOC_SEGMENTATION.training
    height, width = (side + -side % 32 + 2 * 96 for side in PICTURE)
    image, _ = _parts(height, width)
    cells = (PICTURE[0] + -PICTURE[0] % 32) * (PICTURE[1] + -PICTURE[1] % 32)
    model = timm.create_model("rotnet_alexnet", num_classes=21, device="meta")
    scored = work_of(model.head.fc6[0], cells // 32**2, 9216) + work_of(model.head.fc7[0], cells // 32**2, 4096)
    # scores scaled up, their logarithms and the gradient of both
    scored += Work(0, 4 * 21 * cells * 4)
    step = (image + scored) * segmentation.images_per_step
    one_test = (image + scored).operations * SEGMENTATION_TEST
    lines.append(_line("segmentation, FCN", segmentation, 3 * step.operations, one_test, step.kept))
    return "\n".join(lines) + "\n"


def _parts(height: int, width: int) -> tuple[Work, Work]:
    """AlexNet's convolutions on one image, and its fc layers on one 6 x 6 map."""
    model = timm.create_model("rotnet_alexnet", num_classes=20, device="meta").eval()
    return work_of(model.features, 1, 3, height, width), work_of(model.head, 1, 256, 6, 6)


def _detection_work(recipe: VocDetection, side: int, regions: int) -> Work:
    scale = min(side / min(PICTURE), recipe.longest / max(PICTURE))
    image, head = _parts(*(round(part * scale) + 16 for part in PICTURE))
    return image + head * regions


def _imagenet_line(name: str, images: int, operations: float, parameters: int, kept: float) -> str:
    memory = 3 * 4 * parameters + 2 * kept
    seen = f"{images / 1e6:,.0f} million"
    return f"| {name} | {seen} | {operations / 1e9:.1f}e9 | {_hours(operations * images)} | {memory / 2**30:.1f} GiB |"


def _parameters() -> int:
    return sum(p.numel() for p in timm.create_model("rotnet_alexnet", num_classes=20, device="meta").parameters())


def _line(name, training, operations, test, kept) -> str:  # type: ignore[no-untyped-def]
    memory = 3 * 4 * _parameters() + 2 * kept
    return (
        f"| {name} | {training.steps:,} of {training.images_per_step} | {operations / 1e12:.2f}e12 | "
        f"{_hours(operations * training.steps)} | {_hours(test)} | {memory / 2**30:.1f} GiB |"
    )


def _hours(operations: float) -> str:
    hours = operations / RATE / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{max(1, round(60 * hours))} min"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    argparse.ArgumentParser(
        prog="python -m training.studies.alexnet_costs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    rows = read_rows()
    print(layer_table(rows), imagenet_cost_table(), paper_table(rows), cost_table(), sep="\n", end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
