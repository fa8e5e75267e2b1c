"""PASCAL VOC classification: which of the 20 classes appear in an image; mean average precision (table 7 of the paper).

    python -m training voc rotnet_alexnet.gidaris_in1k --data VOCdevkit --layers fc6-8
    python -m training voc rotnet_alexnet.gidaris_in1k --random --data VOCdevkit --layers all --device cuda

A new classifier is trained, together with fc6 and fc7 (--layers fc6-8) or with all layers. Scores are averaged over ten
random crops of each test image. Objects marked difficult do not count.

Three numbers are reported: VOC2007's 11-point average precision, the area under the interpolated precision-recall curve
(VOC2010 and later), and scikit-learn's average precision, which the code of Kraehenbuehl et al., whose settings we use,
reports. The recipes are voc-classification-paper and voc-classification-cpu.
"""

import argparse
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from rotation_ssl.evaluation.frozen import preparation
from rotation_ssl.messages import counted
from rotation_ssl.progress import progress
from training.evaluation.subject import Subject
from training.reporting.report import run_measuring
from training.transfer import command, data
from training.transfer.checking import check_images
from training.transfer.metrics import KINDS, classification_precisions
from training.transfer.network import DEFAULT_RUN, InOrder, RunOptions, autocast_of, batches, fc_size_of, train_network
from training.transfer.recipes import CLASSIFICATIONS, VocClassification

LAYERS = ("fc6-8", "all")
TEST_IMAGES = 8  # whose crops are one batch; how many changes the logits by rounding alone


def random_crop(image: Image.Image, size: int, scales: tuple[float, float], rng: random.Random) -> torch.Tensor:
    """A square of the image at a random place, scaled by a random factor, half of them mirrored.

    Args:
        image: RGB.
        size: side of the result in pixels.
        scales: least and largest factor; a square that would be larger than the image is as large as fits.

    Returns:
        (3, size, size) uint8.
    """
    side = min(size / rng.uniform(*scales), *image.size)
    left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return data.pixels_tensor(crop).flip(-1) if rng.random() < 0.5 else data.pixels_tensor(crop)


def multi_label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sigmoid cross-entropy summed over classes, the mean over images; labels of -1 do not count.

    Args:
        logits: (N, K).
        labels: (N, K) 1, 0, or -1.
    """
    losses = F.binary_cross_entropy_with_logits(logits, labels.clamp_min(0).float(), reduction="none")
    return (losses * (labels >= 0)).sum() / len(logits)


def train_classifier(
    recipe: VocClassification,
    network: nn.Module,
    layers: str,
    images: Sequence[data.AnnotatedImage],
    labels: torch.Tensor,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    size: int,
    run: RunOptions = DEFAULT_RUN,
) -> None:
    """Train a transferred network on labelled images, in place.

    Args:
        network: of :func:`training.transfer.network.transfer_network`, on the device.
        layers: 'fc6-8' keeps the convolutions as they are, 'all' trains everything.
        images: N training images.
        labels: (N, K), of :func:`training.transfer.data.class_labels`.
        prepare: from uint8 crops to what the network takes.
        size: side of the crops.
    """
    head: Any = getattr(network, "head", None)
    has_fc = fc_size_of(network) > 0
    if layers == "fc6-8" and not has_fc:
        raise ValueError("fc6-8 needs a network with fc6 and fc7, an AlexNet: give --layers all")
    if has_fc:
        head.drop.p = recipe.dropout
        head.fc6.append(nn.Dropout(recipe.dropout))
    if layers == "fc6-8":
        network.requires_grad_(False)
        head.requires_grad_(True)
    load = functools.partial(_crop, size, recipe.scales)

    def loss_of(batch: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
        logits = network(prepare(torch.stack([crop for _, crop in batch]).to(run.device))).float()
        return multi_label_loss(logits, labels[[index for index, _ in batch]].to(run.device))

    train_network(recipe.training, network, _numbered(images), load, loss_of, f"classification, {layers}", run)


def classify(
    recipe: VocClassification,
    network: nn.Module,
    images: Sequence[data.AnnotatedImage],
    prepare: Callable[[torch.Tensor], torch.Tensor],
    size: int,
    run: RunOptions = DEFAULT_RUN,
) -> torch.Tensor:
    """Mean logits of each image's crops: (N, K) float32 on the CPU."""
    load = functools.partial(_crops, size, recipe.scales, recipe.test_crops, run.seed)
    logits = []
    with torch.inference_mode(), autocast_of(recipe.training, network), progress("test", len(images)) as bar:
        for batch in batches(InOrder(_numbered(images), load), TEST_IMAGES, run.workers):
            scores = network(prepare(torch.cat(batch).to(run.device))).float()
            logits.append(scores.view(len(batch), recipe.test_crops, -1).mean(1).cpu())
            bar.update(len(batch))
    result = torch.cat(logits)
    if not result.isfinite().all():
        raise ValueError("the network's logits are not finite: lower --lr, or check the weights")
    return result


def measure_classification(
    recipe: VocClassification,
    subject: Subject,
    network: nn.Module,
    layers: str,
    train: Sequence[data.AnnotatedImage],
    test: Sequence[data.AnnotatedImage],
    classes: int,
    run: RunOptions = DEFAULT_RUN,
) -> dict[str, Sequence[float]]:
    """Train a transferred network and measure it: by kind of average precision those of the K classes."""
    data.check_countable(test)
    check_images([image.file for image in (*train, *test)], run.workers)
    prepare = preparation(subject.backbone, subject.size)
    network.to(run.device)
    train_classifier(recipe, network, layers, train, data.class_labels(train, classes), prepare, subject.size, run)
    scores = classify(recipe, network, test, prepare, subject.size, run)
    truth = data.class_labels(test, classes)
    return {kind: classification_precisions(scores, truth, kind) for kind in KINDS}


def _numbered(images: Sequence[data.AnnotatedImage]) -> list[tuple[int, Path]]:
    return list(enumerate(image.file for image in images))


def _crop(
    size: int, scales: tuple[float, float], numbered: tuple[int, Path], rng: random.Random
) -> tuple[int, torch.Tensor]:
    index, file = numbered
    return index, random_crop(data.open_pixels(file), size, scales, rng)


def _crops(size: int, scales: tuple[float, float], crops: int, seed: int, numbered: tuple[int, Path]) -> torch.Tensor:
    index, file = numbered
    rng, image = random.Random(f"{seed} test {index}"), data.open_pixels(file)
    return torch.stack([random_crop(image, size, scales, rng) for _ in range(crops)])


def measure(args: argparse.Namespace) -> Path:
    """Train and measure what the options ask for; returns the file of the rows."""
    recipe = command.recipe_of(CLASSIFICATIONS[args.budget], args)
    transfer = command.prepare_transfer(
        args, recipe, f"classification-{args.layers}",
        lambda split: data.read_annotations(args.data, recipe.splits.year, split, args.classes), recipe.size,
    )  # fmt: skip
    by_class = measure_classification(
        recipe, transfer.subject, transfer.network, args.layers, transfer.train, transfer.test, len(args.classes),
        transfer.run,
    )  # fmt: skip
    crops = f"{counted(recipe.test_crops, 'crop')} of {transfer.subject.size} pixels"
    settings = f"{command.classes_shown(by_class)}, {crops}"
    return command.keep_numbers(transfer, args, by_class, settings, args.classes, args.layers)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = command.transfer_parser("voc", __doc__)
    parser.add_argument("--layers", choices=LAYERS, default="all", help="layers to train [%(default)s]")
    parser.add_argument("--size", type=int, help="side of the crops in pixels [the recipe's, or the model's own]")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(arguments)
    return run_measuring(lambda: measure(args), args.device)
