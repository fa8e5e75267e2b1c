"""PASCAL VOC detection: locate and classify objects; mean average precision (table 7 of the paper).

    python -m training detect rotnet_alexnet.gidaris_in1k --data VOCdevkit --proposals selective-search.safetensors
    python -m training detect rotnet_alexnet.gidaris_in1k --data VOCdevkit --device cuda

With --proposals this is Fast R-CNN on the region proposals of a file, as in the paper; only this result is comparable
with the paper's 54.4 %. Without, it is torchvision's Faster R-CNN, which generates its own proposals, on the same
backbone. AlexNet's fc6 and fc7 classify the regions, other networks get two new fc layers. All layers are trained, on
images of several scales; one scale is used for testing. Objects marked difficult are neither trained on nor counted.

The file of proposals is a safetensors file with a float32 tensor (n, 4) for each image's name ('000005'): left, top,
right, bottom in pixels from the image's corner; python -m training proposals writes one with selective search. The
recipes are voc-fast-rcnn-paper and -cpu, voc-faster-rcnn and voc-faster-rcnn-cpu.
"""

import argparse
import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rotation_ssl.files import sha256_of
from rotation_ssl.progress import progress
from training.reporting.report import run_measuring
from training.transfer import command, data
from training.transfer.checking import check_images
from training.transfer.detector import build_detector, set_sides
from training.transfer.metrics import average_precision, match_detections
from training.transfer.network import (
    DEFAULT_RUN,
    InOrder,
    RunOptions,
    autocast_of,
    batches,
    smallest_side,
    train_network,
)
from training.transfer.pictures import draw_detections, draw_sheet
from training.transfer.proposals import check_proposals_file, read_proposals
from training.transfer.recipes import FAST_RCNNS, FASTER_RCNNS, VocDetection

KINDS = ("11-point", "area")
Detections = dict[str, torch.Tensor]


def train_detector(
    recipe: VocDetection,
    detector: nn.Module,
    images: Sequence[data.AnnotatedImage],
    proposals: Path | None = None,
    run: RunOptions = DEFAULT_RUN,
) -> None:
    """Train a detector in place, on the images that show an object which is not difficult."""
    useful = [image for image in images if bool((~image.difficult).any())]
    if not useful:
        raise ValueError("no training image shows an object that is not difficult: there is nothing to train on")
    set_sides(detector, recipe.train_sides, recipe.longest)
    load = functools.partial(_training_sample, proposals)

    def loss_of(batch: list[tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]]) -> torch.Tensor:
        pixels = [image.to(run.device) / 255 for image, _, _ in batch]
        targets = [{name: tensor.to(run.device) for name, tensor in target.items()} for _, _, target in batch]
        regions = [boxes.to(run.device) for _, boxes, _ in batch if boxes is not None]
        losses = detector(pixels, regions, targets) if proposals else detector(pixels, targets)
        return sum(losses.values(), torch.zeros((), device=run.device))

    name = "Fast R-CNN" if proposals else "Faster R-CNN"
    train_network(recipe.training, detector, useful, load, loss_of, name, run)


def detect(
    recipe: VocDetection,
    detector: nn.Module,
    images: Sequence[data.AnnotatedImage],
    proposals: Path | None = None,
    run: RunOptions = DEFAULT_RUN,
) -> list[Detections]:
    """Of each image 'boxes' (n, 4) in its pixels, 'labels' (n,) from 1 and 'scores' (n,), on the CPU."""
    set_sides(detector, (recipe.test_side,), recipe.longest)
    detector.eval()
    load = functools.partial(_test_sample, proposals, recipe.test_proposals)
    found = []
    with torch.inference_mode(), autocast_of(recipe.training, detector), progress("test", len(images)) as bar:
        for ((image, boxes),) in batches(InOrder(images, load), 1, run.workers):
            pixels = [image.to(run.device) / 255]
            (result,) = detector(pixels) if boxes is None else detector(pixels, [boxes.to(run.device)])
            found.append({name: tensor.cpu() for name, tensor in result.items()})
            bar.update()
    return found


def detection_precisions(
    found: Sequence[Detections], images: Sequence[data.AnnotatedImage], classes: int, kind: str
) -> list[float]:
    """Average precision of each of K classes; nan for those that the images do not show."""
    precisions = []
    for label in range(classes):
        own = [result["labels"] == label + 1 for result in found]
        scores, right, total = match_detections(
            [result["boxes"][chosen] for result, chosen in zip(found, own, strict=True)],
            [result["scores"][chosen] for result, chosen in zip(found, own, strict=True)],
            [image.boxes[image.labels == label] for image in images],
            [image.difficult[image.labels == label] for image in images],
        )
        precisions.append(average_precision(scores, right, kind, total))
    return precisions


def measure_detection(
    recipe: VocDetection,
    network: nn.Module,
    train: Sequence[data.AnnotatedImage],
    test: Sequence[data.AnnotatedImage],
    classes: int,
    proposals: Path | None = None,
    run: RunOptions = DEFAULT_RUN,
) -> tuple[nn.Module, dict[str, Sequence[float]]]:
    """Build a detector on a transferred network, train it, measure it.

    Returns:
        The detector, and by kind of average precision those of the K classes.
    """
    data.check_countable(test)
    if proposals:
        check_proposals_file(proposals, [*train, *test])
    torch.manual_seed(run.seed)
    detector: Any = build_detector(recipe, network, classes, proposals is not None).to(run.device)
    smallest = smallest_side(detector.backbone)
    for images, sides in ((train, recipe.train_sides), (test, (recipe.test_side,))):
        for image in images:
            scale = min(min(sides) / min(image.width, image.height), recipe.longest / max(image.width, image.height))
            width, height = round(image.width * scale), round(image.height * scale)
            data.check_large_enough(image.file, width, height, smallest, " as it is scaled")
    check_images([image.file for image in (*train, *test)], run.workers)
    train_detector(recipe, detector, train, proposals, run)
    found = detect(recipe, detector, test, proposals, run)
    return detector, {kind: detection_precisions(found, test, classes, kind) for kind in KINDS}


def _training_sample(
    proposals: Path | None, image: data.AnnotatedImage, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    pixels, regions = _test_sample(proposals, None, image)
    boxes, labels = image.boxes[~image.difficult], image.labels[~image.difficult] + 1
    if rng.random() < 0.5:
        pixels, boxes = pixels.flip(-1), _mirrored(boxes, image.width)
        regions = None if regions is None else _mirrored(regions, image.width)
    return pixels, regions, {"boxes": boxes, "labels": labels}


def _test_sample(
    proposals: Path | None, most: int | None, image: data.AnnotatedImage
) -> tuple[torch.Tensor, torch.Tensor | None]:
    pixels = data.pixels_tensor(data.open_pixels(image.file))
    return pixels, None if proposals is None else read_proposals(proposals, image, most)


def _mirrored(boxes: torch.Tensor, width: int) -> torch.Tensor:
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


def measure(args: argparse.Namespace) -> Path:
    """Train and measure what the options ask for; returns the file of the rows."""
    if args.test_proposals is not None and not args.proposals:
        raise ValueError("--test-proposals is for Fast R-CNN: give --proposals FILE too")
    sides = {} if args.side is None else {"train_sides": (args.side,), "test_side": args.side}
    recipe = command.recipe_of((FAST_RCNNS if args.proposals else FASTER_RCNNS)[args.budget], args, **sides)
    name, given = "Faster R-CNN", ""
    if args.proposals:
        check_proposals_file(args.proposals, [])
        digest = sha256_of(args.proposals)[:12]
        name, given = "Fast R-CNN", f", proposals {digest}, the first {recipe.test_proposals:,} in the test"
    transfer = command.prepare_transfer(
        args, recipe, recipe.protocol.removeprefix("voc-"),
        lambda split: data.read_annotations(args.data, recipe.splits.year, split, args.classes), given=given,
    )  # fmt: skip
    detector, by_class = measure_detection(
        recipe, transfer.network, transfer.train, transfer.test, len(args.classes), args.proposals,
        transfer.run,
    )  # fmt: skip
    if pictured := transfer.test[: args.pictures]:
        detections = detect(recipe, detector, pictured, args.proposals, RunOptions(args.device))
        draw_sheet(
            transfer.output,
            [
                draw_detections(transfer.output, image.file, found, args.classes)
                for image, found in zip(pictured, detections, strict=True)
            ],
            args.classes,
        )
    settings = (
        f"{name}, {command.classes_shown(by_class)}, shorter side {', '.join(map(str, recipe.train_sides))} in training"
        f" and {recipe.test_side} in the test{given}"
    )
    return command.keep_numbers(transfer, args, by_class, settings, args.classes)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = command.transfer_parser("detect", __doc__)
    parser.add_argument("--proposals", type=Path, metavar="FILE", help="file of region proposals; selects Fast R-CNN")
    parser.add_argument("--side", type=int, help="shorter side of all images in pixels [the recipe's, several]")
    parser.add_argument("--regions", type=int, help="regions per training image [the recipe's]")
    parser.add_argument("--test-proposals", type=int, metavar="N", help="proposals per test image [the recipe's]")
    command.add_pictures_argument(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(arguments)
    return run_measuring(lambda: measure(args), args.device)
