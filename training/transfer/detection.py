"""PASCAL VOC detection: where in an image is what; mean average precision (table 7 of the paper).

    python -m training detect rotnet_alexnet.gidaris_in1k --data VOCdevkit --proposals selective-search.safetensors
    python -m training detect rotnet_alexnet.gidaris_in1k --data VOCdevkit --device cuda

With --proposals it is Fast R-CNN, as in the paper: regions come from a file, and only this number stands beside the
paper's 54.4 %. Without, it is torchvision's Faster R-CNN, which finds its regions itself, on the same backbone. MODEL
is any model of timm or of this package; its batch norm is folded and its layers are rescaled; AlexNet's fc6 and fc7
judge the regions, other networks get two fresh layers. All layers are trained, at several scales of the images; one
scale is measured. Objects marked difficult are neither trained on nor counted.

The file of proposals is a safetensors file with a tensor (n, 4) for each image's name ('000005'), float32: left, top,
right, bottom in pixels from the image's corner; python -m training proposals writes one by selective search.
Settings are the recipes VOC_FAST_RCNN and VOC_FASTER_RCNN in training/transfer/recipes.py. Numbers are in --output as
rows.jsonl, report.md, report.json and report.png, those of every class as classes.json, and the trained network as
network.safetensors.
"""

import argparse
import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import roi_align, roi_pool

from rotation_ssl.machine import TURN_OFF
from rotation_ssl.messages import counted
from rotation_ssl.progress import progress
from training.reporting.report import run_measuring
from training.transfer.command import (
    add_arguments,
    averages,
    count_present,
    keep_numbers,
    prepare_transfer,
    training_of,
    transfer_row,
)
from training.transfer.data import (
    AnnotatedImage,
    check_countable,
    check_large_enough,
    open_pixels,
    pixels_tensor,
    read_annotations,
)
from training.transfer.metrics import average_precision, match_detections
from training.transfer.network import Backbone, Draws, InOrder, batches, read_once, smallest_side, train_network
from training.transfer.proposals import check_proposals_file, read_proposals
from training.transfer.recipes import VOC_FAST_RCNN, VOC_FASTER_RCNN, VocDetection

KINDS = ("11-point", "area")
POOLED = 6  # side of a region's map for AlexNet's fc6
Detections = dict[str, torch.Tensor]


class FastRCNN(nn.Module):
    """Fast R-CNN (Girshick 2015, https://arxiv.org/abs/1504.08083) of torchvision's parts.

    Images and the regions to look at go in; in training, with the objects, the losses come out, otherwise detections,
    as of torchvision's detection models.
    """

    def __init__(self, transform: nn.Module, backbone: Backbone, roi_heads: nn.Module) -> None:
        super().__init__()
        self.transform, self.backbone, self.roi_heads = transform, backbone, roi_heads

    def forward(
        self,
        images: list[torch.Tensor],
        proposals: list[torch.Tensor],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> Any:
        """Losses by name, or for each image 'boxes' (n, 4), 'labels' (n,) from 1 and 'scores' (n,).

        Args:
            images: each (3, H, W), values in 0..1.
            proposals: for each image (n, 4), in its pixels.
            targets: for each image 'boxes' (m, 4) and 'labels' (m,), from 1.
        """
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.transform(images, targets)
        regions = [
            resize_boxes(boxes, size, scaled)
            for boxes, size, scaled in zip(proposals, sizes, batch.image_sizes, strict=True)
        ]
        features = {"0": self.backbone(batch.tensors)}
        detections, losses = self.roi_heads(features, regions, batch.image_sizes, targets)
        if self.training:
            return losses
        transform: Any = self.transform
        return transform.postprocess(detections, batch.image_sizes, sizes)


class FcHead(nn.Module):
    """AlexNet's fc6 and fc7 on the regions' maps, each with dropout after it: (R, C, 6, 6) -> (R, fc_size)."""

    def __init__(self, fc6: nn.Module, fc7: nn.Module, dropout: float) -> None:
        super().__init__()
        self.fc6, self.fc7, self.drop = fc6, fc7, nn.Dropout(dropout)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Features of every region."""
        return self.drop(self.fc7(self.drop(self.fc6(maps.flatten(1)))))


class RegionPool(nn.Module):
    """The regions' maps by one of torchvision's poolings, on a network's only map.

    torchvision's MultiScaleRoIAlign guesses the map's scale from the first images it gets, and wrongly where padding is
    a large part of them.

    Args:
        pool: of a map, its regions, the side of what comes out, and the map's scale: roi_pool, or roi_align.
        reduction: pixels of the image to a cell of the map.
    """

    def __init__(self, pool: Callable[..., torch.Tensor], reduction: int) -> None:
        super().__init__()
        self.pool, self.reduction = pool, reduction

    def forward(
        self, features: dict[str, torch.Tensor], regions: list[torch.Tensor], sizes: list[tuple[int, int]]
    ) -> torch.Tensor:
        """Maps (R, C, 6, 6) of all regions of all images."""
        return self.pool(features["0"], regions, POOLED, 1 / self.reduction)


def build_detector(recipe: VocDetection, network: nn.Module, classes: int, given_regions: bool) -> nn.Module:
    """A detector of K classes on a transferred network, which it takes over.

    Args:
        recipe: the settings.
        network: of :func:`training.transfer.network.transfer_network`.
        classes: K, without the background.
        given_regions: Fast R-CNN, which is given its regions, or else Faster R-CNN.
    """
    cfg = resolve_model_data_config(network)
    head: Any = getattr(network, "head", None)
    fc_size = getattr(head, "fc_size", 0)
    fc_layers = (head.fc6, head.fc7) if fc_size else None
    backbone = Backbone(network)
    width = fc_size or 1024
    box_head = FcHead(*fc_layers, recipe.dropout) if fc_layers else TwoMLPHead(backbone.out_channels * POOLED**2, width)
    predictor = FastRCNNPredictor(width, classes + 1)
    sides = {"min_size": recipe.train_sides, "max_size": recipe.longest}
    settings = {"image_mean": list(cfg["mean"]), "image_std": list(cfg["std"])}
    if not given_regions:
        detector = FasterRCNN(
            backbone,
            rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
            box_head=box_head,
            box_predictor=predictor,
            box_batch_size_per_image=recipe.regions,
            box_nms_thresh=recipe.overlap,
            **sides,
            **settings,
        )
        detector.roi_heads.box_roi_pool = RegionPool(functools.partial(roi_align, sampling_ratio=2), backbone.reduction)
        return detector
    heads = RoIHeads(
        RegionPool(roi_pool, backbone.reduction),
        box_head,
        predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=recipe.regions,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=recipe.overlap,
        detections_per_img=100,
    )
    return FastRCNN(GeneralizedRCNNTransform(**sides, **settings), backbone, heads)


def train_detector(
    recipe: VocDetection,
    detector: nn.Module,
    images: Sequence[AnnotatedImage],
    proposals: Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    workers: int = 0,
    output: Path | None = None,
) -> None:
    """Train a detector in place, on the images that show an object which is not difficult.

    Raises:
        ValueError: no such image, proposals that are none, or a loss that is not finite.
    """
    useful = tuple(image for image in images if bool((~image.difficult).any()))
    if not useful:
        raise ValueError("no training image shows an object that is not difficult: there is nothing to train on")
    torch.manual_seed(seed)
    set_sides(detector, recipe.train_sides, recipe.longest)
    training = recipe.training
    draws = Draws(
        functools.partial(_training_sample, useful, proposals),
        len(useful),
        training.steps * training.images_per_step,
        seed,
    )

    def loss_of(batch: list[tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]]) -> torch.Tensor:
        pixels = [image.to(device) / 255 for image, _, _ in batch]
        targets = [{name: tensor.to(device) for name, tensor in target.items()} for _, _, target in batch]
        regions = [boxes.to(device) for _, boxes, _ in batch if boxes is not None]
        losses = detector(pixels, regions, targets) if proposals else detector(pixels, targets)
        return sum(losses.values(), torch.zeros((), device=device))

    name = "Fast R-CNN" if proposals else "Faster R-CNN"
    train_network(training, detector, batches(draws, training.images_per_step, workers), loss_of, name, output)


def detect(
    recipe: VocDetection,
    detector: nn.Module,
    images: Sequence[AnnotatedImage],
    proposals: Path | None = None,
    device: str = "cpu",
    workers: int = 0,
) -> list[Detections]:
    """Of each image 'boxes' (n, 4) in its pixels, 'labels' (n,) from 1 and 'scores' (n,), on the CPU."""
    set_sides(detector, (recipe.test_side,), recipe.longest)
    detector.eval()
    load = functools.partial(_test_sample, tuple(images), proposals)
    found = []
    with torch.inference_mode(), progress("test", len(images)) as bar:
        for ((image, boxes),) in batches(InOrder(load, len(images)), 1, workers):
            pixels = [image.to(device) / 255]
            (result,) = detector(pixels) if boxes is None else detector(pixels, [boxes.to(device)])
            found.append({name: tensor.cpu() for name, tensor in result.items()})
            bar.update()
    return found


def detection_precisions(
    found: Sequence[Detections], images: Sequence[AnnotatedImage], classes: int, kind: str
) -> list[float]:
    """Average precision of each of K classes; nan for those that the images do not show.

    Raises:
        ValueError: as :func:`training.transfer.metrics.average_precision`.
    """
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
    train: Sequence[AnnotatedImage],
    test: Sequence[AnnotatedImage],
    classes: int,
    proposals: Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    workers: int = 0,
    output: Path | None = None,
) -> tuple[nn.Module, dict[str, Sequence[float]]]:
    """Build a detector on a transferred network, train it, measure it.

    Returns:
        The detector, and by kind of average precision those of the K classes.

    Raises:
        ValueError: an image too small for the network or one that does not decode, test images that show nothing that
            counts, proposals that lack an image or do not fit one, or as :func:`train_detector`.
    """
    check_countable(test)
    if proposals:
        check_proposals_file(proposals, [*train, *test])
    torch.manual_seed(seed)
    detector: Any = build_detector(recipe, network, classes, proposals is not None).to(device)
    smallest = smallest_side(detector.backbone)
    for images, sides in ((train, recipe.train_sides), (test, (recipe.test_side,))):
        for image in images:
            scale = min(min(sides) / min(image.width, image.height), recipe.longest / max(image.width, image.height))
            width, height = round(image.width * scale), round(image.height * scale)
            check_large_enough(image.file, width, height, smallest, " as it is scaled")
    read_once(functools.partial(_read, (*train, *test), proposals), len(train) + len(test), workers)
    train_detector(recipe, detector, train, proposals, device, seed, workers, output)
    found = detect(recipe, detector, test, proposals, device, workers)
    return detector, {kind: detection_precisions(found, test, classes, kind) for kind in KINDS}


def set_sides(detector: nn.Module, sides: tuple[int, ...], longest: int) -> None:
    """Let a detector scale images so that the shorter side is one of ``sides``, drawn anew in training."""
    transform: Any = detector.transform
    transform.min_size, transform.max_size = sides, longest


def _training_sample(
    images: tuple[AnnotatedImage, ...], proposals: Path | None, index: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    image = images[index]
    pixels, regions = _test_sample(images, proposals, index)
    boxes, labels = image.boxes[~image.difficult], image.labels[~image.difficult] + 1
    if rng.random() < 0.5:
        pixels, boxes = pixels.flip(-1), _mirrored(boxes, image.width)
        regions = None if regions is None else _mirrored(regions, image.width)
    return pixels, regions, {"boxes": boxes, "labels": labels}


def _test_sample(
    images: tuple[AnnotatedImage, ...], proposals: Path | None, index: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    image = images[index]
    return pixels_tensor(open_pixels(image.file)), None if proposals is None else read_proposals(proposals, image)


def _read(images: tuple[AnnotatedImage, ...], proposals: Path | None, index: int) -> None:
    _test_sample(images, proposals, index)


def _mirrored(boxes: torch.Tensor, width: int) -> torch.Tensor:
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training detect", description=__doc__, epilog=TURN_OFF,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser, "2007", "trainval", "test")
    parser.add_argument("--proposals", type=Path, metavar="FILE", help="regions of every image: Fast R-CNN")
    parser.add_argument("--side", type=int, help="shorter side of all images, instead of the recipe's several")
    args = parser.parse_args(arguments)

    def measure() -> Path:
        recipe = VOC_FAST_RCNN if args.proposals else VOC_FASTER_RCNN
        recipe = dataclasses.replace(recipe, training=training_of(recipe.training, args))
        if args.side is not None:
            recipe = dataclasses.replace(recipe, train_sides=(args.side,), test_side=args.side)
        name, protocol, given = "Faster R-CNN", "voc-faster-rcnn", ""
        if args.proposals:
            name, protocol = "Fast R-CNN", "voc-fast-rcnn"
            check_proposals_file(args.proposals, [])
            given = f", proposals {hashlib.sha256(args.proposals.read_bytes()).hexdigest()[:12]}"
        transfer = prepare_transfer(
            args, parser, recipe.training, protocol.removeprefix("voc-"),
            lambda split: read_annotations(args.data, args.year, split, args.classes),
        )  # fmt: skip
        if not args.proposals:
            # the paper has Fast R-CNN alone
            transfer = dataclasses.replace(transfer, budget="")
        _, by_class = measure_detection(
            recipe, transfer.network, transfer.train, transfer.test, len(args.classes), args.proposals, args.device,
            args.seed, args.workers, transfer.output,
        )  # fmt: skip
        classes = counted(count_present(by_class), "class", "classes")
        settings = (
            f"{name}, {classes}, shorter side {', '.join(map(str, recipe.train_sides))} in training and"
            f" {recipe.test_side} in the test{given}"
        )
        rows = [
            transfer_row(transfer, args, value, f"{protocol}-{kind}", settings)
            for kind, value in averages(by_class).items()
        ]
        return keep_numbers(transfer.output, rows, by_class, args.classes)

    return run_measuring(measure, args.device)
