"""PASCAL VOC segmentation: the class of every pixel; mean intersection over union (table 7 of the paper).

    python -m training segment rotnet_alexnet.gidaris_in1k --data VOCdevkit --device cuda

A fully convolutional network (Long, Shelhamer, Darrell 2015, https://arxiv.org/abs/1411.4038): AlexNet's fc6 and fc7 as
convolutions, with scores for every class at stride 32, which are upsampled to the image. Other networks, and AlexNet
with --fc-size 0, compute the scores from the last feature layer. All layers are trained on whole images. Pixels
labelled 255 are ignored. The recipes are voc-segmentation-paper and voc-segmentation-cpu. The paper does not name its
splits: --budget paper uses VOC2012's train and val, --budget cpu VOC2007's trainval and test.
"""

import argparse
import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F

from rotation_ssl.backbones.alexnet import POOL_SIZE, RotNetAlexNet
from rotation_ssl.images import normalize
from rotation_ssl.progress import progress
from training.reporting.report import run_measuring
from training.transfer import command, data
from training.transfer.checking import check_images, check_masks
from training.transfer.metrics import IGNORED, confusion_matrix, intersections_over_unions
from training.transfer.network import DEFAULT_RUN, Backbone, InOrder, RunOptions, autocast_of, batches, train_network
from training.transfer.pictures import draw_segmentation, draw_sheet
from training.transfer.recipes import SEGMENTATIONS, VocSegmentation


class Fcn(nn.Module):
    """A transferred network that scores every pixel: images (N, 3, H, W) -> logits (N, K + 1, H, W).

    It takes uint8 images and normalises them. Cell j of the map is scaled up to pixels j * stride to (j + 1) * stride;
    AlexNet's images are padded by as much as puts the middle of what a cell sees there.

    Args:
        network: of :func:`training.transfer.network.transfer_network`, which is taken over.
        classes: K, without the background.
        dropout: after fc6 and fc7.
    """

    def __init__(self, network: nn.Module, classes: int, dropout: float) -> None:
        super().__init__()
        cfg = resolve_model_data_config(network)
        self.mean, self.std = cfg["mean"], cfg["std"]
        if isinstance(network, RotNetAlexNet) and network.head.fc_size:
            head: Any = network.head
            # conv1 to pool5 see 31.5 pixels around the first cell's middle and fc6 2.5 cells of 32 more: 111.5, not 16
            self.padding, self.stride, width = 96, 32, head.fc_size
            self.maps: nn.Module = nn.Sequential(
                network.features,
                _as_convolution(head.fc6[0], POOL_SIZE), nn.ReLU(inplace=True), nn.Dropout(dropout),
                _as_convolution(head.fc7[0], 1), nn.ReLU(inplace=True), nn.Dropout(dropout),
            )  # fmt: skip
        else:
            backbone = Backbone(network)
            self.padding, self.stride, width = 0, backbone.reduction, backbone.out_channels
            self.maps = backbone
        self.score = nn.Conv2d(width, classes + 1, 1)
        # as in the paper of FCN: no class is preferred to begin with
        for parameter in self.score.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of the background and K classes for every pixel."""
        height, width = images.shape[-2:]
        right, below = -width % self.stride, -height % self.stride
        padded = F.pad(
            normalize(images, self.mean, self.std),
            (self.padding, self.padding + right, self.padding, self.padding + below),
        )
        scores = self.score(self.maps(padded)).float()
        size = (height + below, width + right)
        return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)[..., :height, :width]


def pixel_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, the mean over pixels that count.

    Args:
        logits: (N, K + 1, H, W).
        masks: (N, H, W) 0..K, or 255 for pixels that do not count.
    """
    counted = (masks != IGNORED).sum().clamp_min(1)
    return F.cross_entropy(logits, masks.long(), ignore_index=IGNORED, reduction="sum") / counted


def train_segmenter(
    recipe: VocSegmentation,
    network: Fcn,
    images: Sequence[data.MaskedImage],
    run: RunOptions = DEFAULT_RUN,
) -> None:
    """Train a network on images and masks, in place."""
    load = functools.partial(_training_sample, network.score.out_channels - 1, recipe.longest)

    def loss_of(batch: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        pixels, masks = together(batch, network.mean)
        return pixel_loss(network(pixels.to(run.device)), masks.to(run.device))

    train_network(recipe.training, network, images, load, loss_of, "segmentation", run)


def together(
    samples: Sequence[tuple[torch.Tensor, torch.Tensor]], mean: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and masks of different sizes as one batch: the mean colour, which does not count, right of and below them.

    Args:
        samples: (3, H, W) and (H, W), uint8.
        mean: colour in 0..1.

    Returns:
        (N, 3, H', W') and (N, H', W'), uint8, as large as the largest.
    """
    height, width = (max(mask.shape[side] for _, mask in samples) for side in (0, 1))
    colour = torch.tensor(mean).mul(255).round().to(torch.uint8).view(1, 3, 1, 1)
    pixels = colour.repeat(len(samples), 1, height, width)
    masks = torch.full((len(samples), height, width), IGNORED, dtype=torch.uint8)
    for index, (image, mask) in enumerate(samples):
        pixels[index, :, : mask.shape[0], : mask.shape[1]] = image
        masks[index, : mask.shape[0], : mask.shape[1]] = mask
    return pixels, masks


def segment(
    recipe: VocSegmentation, network: Fcn, images: Sequence[data.MaskedImage], run: RunOptions = DEFAULT_RUN
) -> torch.Tensor:
    """Pixels of all images by true (rows) and predicted class: (K + 1, K + 1) int64.

    Images are scaled down as in training; every pixel of the mask as it is stored is judged.
    """
    network.eval()
    classes = network.score.out_channels
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    load = functools.partial(_test_sample, classes - 1, recipe.longest)
    with torch.inference_mode(), autocast_of(recipe.training, network), progress("test", len(images)) as bar:
        for ((pixels, mask),) in batches(InOrder(images, load), 1, run.workers):
            confusion += confusion_matrix(predict(network, pixels.to(run.device), mask.shape).cpu(), mask, classes)
            bar.update()
    return confusion


def predict(network: Fcn, pixels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The class of every pixel of an image (3, h, w) uint8, scaled up to ``size``: (H, W) int64."""
    logits = network(pixels[None])
    if logits.shape[-2:] != tuple(size):
        logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
    return logits.argmax(1)[0]


def draw_pictures(
    recipe: VocSegmentation,
    network: Fcn,
    images: Sequence[data.MaskedImage],
    classes: Sequence[str],
    output: Path,
    device: str = "cpu",
) -> None:
    """Write the predicted classes of images over them, into ``output``/pictures, and all of them on pictures.jpg."""
    pictures = []
    with torch.inference_mode(), autocast_of(recipe.training, network):
        for image in images:
            pixels, mask = _test_sample(len(classes), recipe.longest, image)
            predicted = predict(network, pixels.to(device), mask.shape).cpu()
            pictures.append(draw_segmentation(output, image.file, predicted, len(classes)))
    if pictures:
        draw_sheet(output, pictures, classes)


def measure_segmentation(
    recipe: VocSegmentation,
    network: nn.Module,
    train: Sequence[data.MaskedImage],
    test: Sequence[data.MaskedImage],
    classes: int,
    run: RunOptions = DEFAULT_RUN,
) -> tuple[Fcn, list[float]]:
    """Build a fully convolutional network on a transferred one, train it, measure it.

    Returns:
        The network, and the intersection over union of the background and K classes, nan for those that are not there.
    """
    torch.manual_seed(run.seed)
    fcn = Fcn(network, classes, recipe.dropout).to(run.device)
    for image in (*train, *test):
        width, height = scaled_size(image.width, image.height, recipe.longest)
        scaled = " as it is scaled" if (width, height) != (image.width, image.height) else ""
        data.check_large_enough(image.file, width, height, fcn.stride, scaled)
    check_images([image.file for image in (*train, *test)], run.workers)
    check_masks([image.mask for image in (*train, *test)], classes, run.workers)
    train_segmenter(recipe, fcn, train, run)
    return fcn, intersections_over_unions(segment(recipe, fcn, test, run))


def _as_convolution(layer: Any, side: int) -> nn.Conv2d:
    """A linear layer on flattened (C, side, side) maps as the convolution that computes the same."""
    channels = layer.in_features // side**2
    convolution = nn.Conv2d(channels, layer.out_features, side)
    convolution.weight = nn.Parameter(layer.weight.detach().view(-1, channels, side, side).clone())
    convolution.bias = nn.Parameter(layer.bias.detach().clone())
    return convolution


def scaled_size(width: int, height: int, longest: int | None) -> tuple[int, int]:
    """Width and height of an image whose longer side is scaled down to ``longest`` pixels (None: as it is)."""
    factor = min(1.0, longest / max(width, height)) if longest else 1.0
    return max(1, round(width * factor)), max(1, round(height * factor))


def _training_sample(
    classes: int, longest: int | None, image: data.MaskedImage, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, mask = _test_sample(classes, longest, image)
    if mask.shape != pixels.shape[1:]:
        # classes have no values in between
        mask = F.interpolate(mask[None, None].float(), size=pixels.shape[1:], mode="nearest-exact")[0, 0].byte()
    return (pixels.flip(-1), mask.flip(-1)) if rng.random() < 0.5 else (pixels, mask)


def _test_sample(classes: int, longest: int | None, image: data.MaskedImage) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = data.open_pixels(image.file)
    size = scaled_size(image.width, image.height, longest)
    if size != pixels.size:
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)
    return data.pixels_tensor(pixels), data.open_mask(image.mask, classes)


def measure(args: argparse.Namespace) -> Path:
    """Train and measure what the options ask for; returns the file of the rows."""
    recipe = command.recipe_of(SEGMENTATIONS[args.budget], args)
    transfer = command.prepare_transfer(
        args, recipe, "segmentation", lambda split: data.read_masks(args.data, recipe.splits.year, split)
    )
    network, values = measure_segmentation(
        recipe, transfer.network, transfer.train, transfer.test, len(args.classes), transfer.run
    )
    draw_pictures(recipe, network, transfer.test[: args.pictures], args.classes, transfer.output, args.device)
    by_class = {command.IOU: values}
    scaled = f", longer side {recipe.longest} pixels" if recipe.longest else ""
    settings = f"FCN, {command.classes_shown(by_class)} with the background{scaled}"
    return command.keep_numbers(transfer, args, by_class, settings, ("background", *args.classes))


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = command.transfer_parser("segment", __doc__)
    parser.add_argument("--longest", type=int, metavar="PIXELS", help="longer side images are scaled to [the recipe's]")
    command.add_pictures_argument(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(arguments)
    return run_measuring(lambda: measure(args), args.device)
