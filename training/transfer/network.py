"""What is transferred to PASCAL VOC: the network, its samples, its training loop."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from rotation_ssl.backbones.alexnet import FcHead, RotNetAlexNet
from rotation_ssl.evaluation.frozen import preparation
from rotation_ssl.files import replace_tensors
from rotation_ssl.fit import Checkpoint, fit
from rotation_ssl.images import square
from rotation_ssl.messages import first_line
from rotation_ssl.precision import autocast_type, resolve_precision
from rotation_ssl.pretraining.optim import create_scheduler
from training.evaluation.subject import Subject
from training.transfer.data import open_pixels
from training.transfer.recipes import Training
from training.transfer.rescale import centre, fold_batch_norms, rescale

RESCALING_IMAGES = 32
NETWORK = "network.safetensors"


@dataclass(frozen=True)
class RunOptions:
    """How a transfer is computed: the ``device`` that the network is on, and the ``seed`` of samples and layers.

    ``workers`` are data-loading worker processes, 0 for this process. The trained network is written into the folder
    ``output``, if any, before anything is measured that may fail. Training resumes from ``checkpoint``, if given.
    """

    device: str = "cpu"
    seed: int = 0
    workers: int = 0
    output: Path | None = None
    checkpoint: Checkpoint | None = None


DEFAULT_RUN = RunOptions()


class Draws(Dataset):
    """``total`` samples of images, a new order every epoch; sample i is the same whoever loads it.

    Args:
        images: anything that ``load`` takes.
        load: from an image and a random.Random of its own to a sample.
        total: number of samples.
        seed: random seed of the orders and the samples.
    """

    def __init__(self, images: Sequence[Any], load: Callable[[Any, random.Random], Any], total: int, seed: int) -> None:
        self.images, self.load, self.total, self.seed = images, load, total, seed
        self.epoch, self.order = -1, images

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Any:
        epoch, position = divmod(index, len(self.images))
        if epoch != self.epoch:
            # kept: an order takes milliseconds
            self.epoch = epoch
            self.order = random.Random(f"{self.seed} epoch {epoch}").sample(self.images, len(self.images))
        return _loaded(self.load, self.order[position], random.Random(f"{self.seed} sample {index}"))


class InOrder(Dataset):
    """Every image once, in their order; ``load`` takes one."""

    def __init__(self, images: Sequence[Any], load: Callable[[Any], Any]) -> None:
        self.images, self.load = images, load

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return _loaded(self.load, self.images[index])


def transfer_network(
    subject: Subject,
    num_classes: int,
    files: Sequence[Path],
    fc_size: int | None = None,
    scaled: bool = True,
    seed: int = 0,
    fresh_fc_size: int = 4096,
) -> nn.Module:
    """The subject's network with a fresh classifier, batch norm folded and layers rescaled, in eval mode.

    Before the rescaling layers without learned weights are centred: the fresh ones, or all of a random network.

    Args:
        subject: the backbone; it is not used up.
        num_classes: K of the classifier.
        files: training images, some of which the rescaling looks at.
        fc_size: width of AlexNet's fc6 and fc7, 0 for none. None: those that the weights have. Layers that the weights
            do not have are fresh.
        scaled: centre and rescale the layers (they must be a chain, as AlexNet's are).
        seed: random seed of the new layers.
        fresh_fc_size: width where the weights have no fc6 and fc7; the paper's is 4096.
    """
    if fc_size is not None and fc_size < 0:
        raise ValueError(f"--fc-size must be 0 (no fc layers) or more, got {fc_size}")
    torch.manual_seed(seed)
    prepare = preparation(subject.backbone, subject.size)
    network: Any = fold_batch_norms(subject.backbone)
    learned = set() if subject.random else set(network.modules())
    if isinstance(network, RotNetAlexNet):
        wanted = network.head.fc_size or fresh_fc_size if fc_size is None else fc_size
        if network.head.fc_size != wanted:
            network.head = FcHead(network.num_features, num_classes, wanted)
    elif fc_size is not None:
        raise ValueError(f"{subject.architecture} has no fc6 and fc7: leave --fc-size out")
    network.reset_classifier(num_classes)
    fresh = [name for name, module in network.named_modules() if module not in learned]
    # a fresh head comes with batch norms of its own
    network = fold_batch_norms(network)
    if not scaled:
        return network
    chosen = random.Random(seed).sample(list(files), min(RESCALING_IMAGES, len(files)))
    pixels = np.stack([np.asarray(square(open_pixels(file), subject.size)) for file in chosen])
    images = prepare(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    try:
        centre(network, images, {module for name, module in network.named_modules() if name in fresh})
        return rescale(network, images)
    except ValueError as error:
        raise ValueError(f"{subject.name} cannot be rescaled ({error}); give --no-rescale") from error


class Backbone(nn.Module):
    """A network up to its last feature layer, as a map that images of any size can be laid over.

    Images (N, 3, H, W) -> (N, C, H', W'); cell j of the map lies at pixels j * reduction to (j + 1) * reduction, as
    torchvision's detection and an upsampling take it: AlexNet, whose convolutions and pools are padded less, gets its
    images padded by 8 pixels (of the mean colour) for that. A network that timm cannot cut, or that takes images of one
    size alone, is refused.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        whole: Any = network
        if not hasattr(whole, "forward_intermediates") or not hasattr(whole, "feature_info"):
            raise ValueError(f"{type(whole).__name__} cannot be cut at a layer: timm gives it no forward_intermediates")
        info = list(whole.feature_info)
        self.network = whole
        self.out_channels: int = info[-1]["num_chs"]
        self.reduction: int = info[-1]["reduction"]
        self.padding = 8 if isinstance(whole, RotNetAlexNet) else 0
        whole.prune_intermediate_layers([len(info) - 1])
        device = next(whole.parameters()).device
        try:
            with torch.inference_mode():
                self(torch.zeros(1, 3, 4 * self.reduction, 6 * self.reduction, device=device))
        except (RuntimeError, AssertionError) as error:
            reason = first_line(error)
            raise ValueError(
                f"{type(whole).__name__} does not take images of any size ({reason}): take a convolutional network"
            ) from error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The last layer's map, in float32: boxes take the map's type, and bfloat16 has no pixels above 256."""
        images = nn.functional.pad(images, [self.padding] * 4)
        network: Any = self.network
        return network.forward_intermediates(images, 1, stop_early=True, intermediates_only=True)[-1].float()


def smallest_side(network: nn.Module) -> int:
    """The least side in pixels of a square image that the network's strides leave something of."""
    device = next(network.parameters()).device
    with torch.inference_mode():
        for side in range(1, 513):
            try:
                network(torch.zeros(1, 3, side, side, device=device))
            except (RuntimeError, AssertionError):
                continue
            return side
    raise ValueError("the network takes no images of up to 512 pixels")


def autocast_of(training: Training, network: nn.Module) -> torch.autocast:
    """The context that the network computes in, in training and test."""
    device = next(network.parameters()).device
    dtype = autocast_type(resolve_precision(training.precision, device))
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def batches(draws: Dataset, size: int, workers: int) -> Iterator[list[Any]]:
    """The samples in lists of ``size``, loaded by ``workers`` processes (0: in this process).

    Raises:
        ValueError: a sample cannot be loaded, in whichever process.
        OSError: the same.
        RuntimeError: a process was killed; :func:`training.command.run` tells it in one line.
    """
    # forked, as Python's default was up to 3.13: otherwise every tensor of the annotations takes a file descriptor
    context = "fork" if workers and sys.platform == "linux" else None
    loader = DataLoader(draws, size, num_workers=workers, collate_fn=list, multiprocessing_context=context)
    # at once: it draws a random number, before a checkpoint's are restored
    return _without_errors(iter(loader))


def check_apart(train: Sequence[Any], test: Sequence[Any]) -> None:
    """Refuse to measure on images that are trained on."""
    both = sorted({image.file for image in train} & {image.file for image in test})
    if both:
        raise ValueError(
            f"{both[0].name} is trained on and measured ({len(both)} of the images): give --train and --test "
            "splits that have no image in common"
        )


def train_network(
    training: Training,
    network: nn.Module,
    images: Sequence[Any],
    load: Callable[[Any, random.Random], Any],
    loss_of: Callable[[list[Any]], torch.Tensor],
    name: str,
    run: RunOptions,
) -> None:
    """Train the parameters of the network that require gradients; it is in eval mode afterwards.

    Args:
        network: trained in place.
        images: the training images.
        load: from an image and a random.Random to a sample, as for :class:`Draws`.
        loss_of: from the list of a step's samples to their loss, ().
        name: for the progress bar and errors.
    """
    if run.output:
        run.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.seed)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, training.lr, momentum=training.momentum, weight_decay=training.weight_decay, fused=True
    )
    scheduler = create_scheduler(training.schedule, optimizer, training.steps)
    checkpoint = run.checkpoint or Checkpoint()
    total = training.steps * training.images_per_step
    rest = Subset(Draws(images, load, total, run.seed), range(checkpoint.done * training.images_per_step, total))
    samples = batches(rest, training.images_per_step, run.workers)
    checkpoint.restore(network=network, optimizer=optimizer, scheduler=scheduler)
    fit(
        network, samples, loss_of, optimizer, name=name, steps=training.steps, images_per_step=training.images_per_step,
        scheduler=scheduler, clip=training.clip,
        autocast=autocast_type(resolve_precision(training.precision, next(network.parameters()).device)),
        checkpoint=checkpoint,
    )  # fmt: skip
    if run.output:
        replace_tensors(run.output / NETWORK, lambda file: save_model(network, str(file)))


def fc_size_of(network: nn.Module) -> int:
    """The width of AlexNet's fc6 and fc7; 0 of a network without them."""
    size: int = getattr(getattr(network, "head", None), "fc_size", 0)
    return size


def _without_errors(found: Iterator[list[Any]]) -> Iterator[list[Any]]:
    """The batches, up to the first sample that could not be loaded, whose error is raised."""
    for batch in found:
        for sample in batch:
            if isinstance(sample, Exception):
                raise sample
        yield batch


def _loaded(load: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return load(*arguments)
    except (ValueError, OSError) as error:
        # handed on: out of another process it would come as that process's traceback
        return error
