"""What the three PASCAL VOC commands share: the network that is transferred, its training loop, its numbers."""

import argparse
import dataclasses
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors.torch import save_model
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from rotation_ssl.backbones.alexnet import FcHead, RotNetAlexNet
from rotation_ssl.images import square
from training.optimizers import learning_rate_factor, set_learning_rates
from training.protocols import Training
from training.report import keep_row, write_report
from training.rescale import centre, fold_batch_norms, rescale
from training.results import Row, current_commit, device_name, library_versions
from training.subject import Subject, load_subject, preparation
from training.voc_data import CLASSES, open_pixels
from training.voc_metrics import mean_over_classes

FC_SIZE = 4096  # of the paper's fc6 and fc7
RESCALING_IMAGES = 32
NETWORK = "network.safetensors"
# options that leave the protocol as it is: what is transferred, and where and how it is worked on
NOT_OF_THE_PROTOCOL = frozenset(
    ("model", "weights", "random", "data_dir", "layers", "proposals", "seed", "workers", "device", "output")
)


class Draws(Dataset):
    """``total`` samples of ``count`` images, a new order every epoch; sample i is the same whoever loads it.

    Args:
        load: from an image's position and a source of randomness of its own to a sample.
        count: images.
        total: samples.
        seed: of the orders and the samples.
    """

    def __init__(self, load: Callable[[int, random.Random], Any], count: int, total: int, seed: int) -> None:
        self.load, self.count, self.total, self.seed = load, count, total, seed
        self.epoch, self.order = -1, [0]

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Any:
        epoch, position = divmod(index, self.count)
        if epoch != self.epoch:
            # kept: an order takes milliseconds
            self.epoch = epoch
            self.order = random.Random(f"{self.seed} epoch {epoch}").sample(range(self.count), self.count)
        return _loaded(self.load, self.order[position], random.Random(f"{self.seed} sample {index}"))


class InOrder(Dataset):
    """Every one of ``count`` images once, in their order; ``load`` takes an image's position."""

    def __init__(self, load: Callable[[int], Any], count: int) -> None:
        self.load, self.count = load, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return _loaded(self.load, index)


def transfer_network(
    subject: Subject,
    num_classes: int,
    files: Sequence[Path],
    fc_size: int | None = None,
    scaled: bool = True,
    seed: int = 0,
) -> nn.Module:
    """The subject's network with a fresh classifier, batch norm folded and layers rescaled, in eval mode.

    Before the rescaling layers without learned weights are centred: the fresh ones, or all of a random network.

    Args:
        subject: the backbone; it is not used up.
        num_classes: K of the classifier.
        files: training images, some of which the rescaling looks at.
        fc_size: width of AlexNet's fc6 and fc7, 0 for none. None: those that the weights have, else the paper's 4096.
            fc layers that the weights do not have are fresh.
        scaled: centre and rescale the layers (they must be a chain, as AlexNet's are).
        seed: of what is fresh.

    Raises:
        ValueError: fc layers for a network that is no AlexNet, or what :mod:`training.rescale` refuses.
    """
    torch.manual_seed(seed)
    prepare = preparation(subject.backbone, subject.size)
    network: Any = fold_batch_norms(subject.backbone)
    random_weights = subject.name.startswith(f"{subject.architecture}.random")
    learned = set() if random_weights else set(network.modules())
    if isinstance(network, RotNetAlexNet):
        wanted = network.head.fc_size or FC_SIZE if fc_size is None else fc_size
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
    images padded by 8 pixels (of the mean colour) for that.

    Raises:
        ValueError: a network that timm cannot cut.
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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The last layer's map."""
        images = nn.functional.pad(images, [self.padding] * 4)
        network: Any = self.network
        return network.forward_intermediates(images, 1, stop_early=True, intermediates_only=True)[-1]


def smallest_side(network: nn.Module, most: int = 512) -> int:
    """The least side in pixels of a square image that the network's strides leave something of.

    Raises:
        ValueError: it takes none of up to ``most`` pixels.
    """
    device = next(network.parameters()).device
    with torch.inference_mode():
        for side in range(1, most + 1):
            try:
                network(torch.zeros(1, 3, side, side, device=device))
            except (RuntimeError, AssertionError):
                continue
            return side
    raise ValueError(f"the network takes no images of up to {most} pixels")


def batches(draws: Dataset, size: int, workers: int) -> Iterator[list[Any]]:
    """The samples in lists of ``size``, loaded by ``workers`` processes (0: by this one).

    Raises:
        ValueError: a sample cannot be loaded, in whichever process.
        OSError: the same.
    """
    # forked, as Python's default was up to 3.13: otherwise every tensor of the annotations takes a file descriptor
    context = "fork" if workers and sys.platform == "linux" else None
    loader = DataLoader(
        draws, batch_size=size, num_workers=workers, collate_fn=list, multiprocessing_context=context
    )  # fmt: skip
    for batch in loader:
        for sample in batch:
            if isinstance(sample, Exception):
                raise sample
        yield batch


def read_once(load: Callable[[int], Any], count: int, workers: int = 0) -> None:
    """Load every one of ``count`` samples and drop it, so that one which does not read is found before the training.

    Raises:
        ValueError: as ``load``.
        OSError: as ``load``.
    """
    with tqdm(total=count, desc="checking", unit="img", mininterval=0.5, disable=count < 500) as bar:
        for (_,) in batches(InOrder(load, count), 1, workers):
            bar.update()


def check_apart(train: Sequence[Any], test: Sequence[Any]) -> None:
    """Refuse to measure on images that are trained on.

    Raises:
        ValueError: an image is in both splits; the error names one.
    """
    both = sorted({image.file for image in train} & {image.file for image in test})
    if both:
        raise ValueError(
            f"{len(both)} images are trained on and measured, {both[0].name} among them: give --train and --test "
            "splits that have no image in common"
        )


def train_network(
    training: Training,
    network: nn.Module,
    samples: Iterator[list[Any]],
    loss_of: Callable[[list[Any]], torch.Tensor],
    name: str,
    output: Path | None = None,
) -> None:
    """Train those of the network's parameters that want gradients; it is in eval mode afterwards.

    Args:
        training: the settings.
        network: trained in place.
        samples: lists of as many samples as a step has images.
        loss_of: the loss of such a list.
        name: for the progress bar and errors.
        output: a folder that the trained network is written to, before anything is measured that may fail.

    Raises:
        ValueError: a loss that is not finite.
        OSError: the folder cannot be made or written to.
    """
    if output:
        output.mkdir(parents=True, exist_ok=True)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, training.lr, momentum=training.momentum, weight_decay=training.weight_decay)
    network.train()
    losses: list[torch.Tensor] = []
    with tqdm(
        total=training.steps * training.images_per_step,
        desc=name,
        unit="img",
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    ) as bar:
        for step, batch in zip(range(training.steps), samples, strict=False):
            set_learning_rates([optimizer], learning_rate_factor(training.schedule, step, training.steps))
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, training.clip)
            optimizer.step()
            losses.append(loss.detach())
            bar.update(len(batch))
            if step % 20 == 19 or step == training.steps - 1:
                mean = torch.stack(losses).mean()
                if not mean.isfinite():
                    raise ValueError(f"the loss became {mean.item()} by step {step + 1} of {name}: lower --lr")
                bar.set_postfix(loss=f"{mean.item():.3f}")
                losses.clear()
    network.eval()
    if output:
        save_model(network, str(output / NETWORK))


def add_arguments(parser: argparse.ArgumentParser, year: str, train: str, test: str) -> None:
    """The options that the three commands have in common; the data's defaults are the paper's."""
    parser.add_argument("model", metavar="MODEL", help="any model or model.tag of timm, rotnet_alexnet among them")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="start from a safetensors file")
    parser.add_argument("--random", action="store_true", help="start from random weights")
    parser.add_argument("--data-dir", type=Path, default=Path("data/VOCdevkit"), help="the VOCdevkit [%(default)s]")
    parser.add_argument("--year", default=year, help="of VOCdevkit/VOC<year> [%(default)s]")
    parser.add_argument("--train", default=train, metavar="SPLIT", help="what is trained on [%(default)s]")
    parser.add_argument("--test", default=test, metavar="SPLIT", help="what is measured [%(default)s]")
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), metavar="CLASS", help="of the data [VOC's 20]")
    parser.add_argument("--steps", type=int, help="of the training, instead of the recipe's")
    parser.add_argument("--images-per-step", type=int, metavar="N", help="instead of the recipe's")
    parser.add_argument("--lr", type=float, help="learning rate, instead of the recipe's")
    parser.add_argument(
        "--fc-size", type=int, metavar="N", help="width of AlexNet's fc6 and fc7 [the weights', or 4096]"
    )
    parser.add_argument("--no-rescale", action="store_true", help="leave the layers' scales as they are")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random [%(default)s]")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images [%(default)s]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps [%(default)s]")
    parser.add_argument(
        "--output", type=Path, help="new folder of rows, report and network [runs/voc/<weights>/<what is trained>]"
    )


def training_of(training: Training, args: argparse.Namespace) -> Training:
    """A recipe's training with what the command line changes.

    Raises:
        ValueError: a value out of range.
    """
    given = {"steps": args.steps, "images_per_step": args.images_per_step, "lr": args.lr}
    return dataclasses.replace(training, **{name: value for name, value in given.items() if value is not None})


def cost_of(args: argparse.Namespace, parser: argparse.ArgumentParser, fresh_fc: bool) -> str:
    """The row's word for what the training costs: 'paper' for the recipe and the data as they are, '' for others.

    Args:
        args: of the command line.
        parser: gives the defaults.
        fresh_fc: weights without fc6 and fc7 were given new ones.
    """
    as_it_is = all(
        value == parser.get_default(name) for name, value in vars(args).items() if name not in NOT_OF_THE_PROTOCOL
    )
    return "paper" if as_it_is and (args.random or not fresh_fc) else ""


def output_of(args: argparse.Namespace, subject: Subject, what: str) -> Path:
    """The folder of a training, a new one for each.

    Args:
        args: of the command line.
        subject: the backbone.
        what: is trained, in a word that is good as a folder's name.

    Raises:
        ValueError: it has a trained network already.
    """
    output = args.output or Path("runs") / "voc" / subject.name / f"{what}-seed{args.seed}"
    if (output / NETWORK).exists():
        raise ValueError(f"{output / NETWORK} is another training's: give a new --output, or remove it")
    return output


def data_name(args: argparse.Namespace) -> str:
    """What the row calls the measured images: VOC's own name where the classes are VOC's, else the folder's as well."""
    name = f"VOC{args.year} {args.test}"
    return name if tuple(args.classes) == CLASSES else f"{args.data_dir.resolve().name}, {name}"


def subject_of(args: argparse.Namespace, size: int | None = None) -> Subject:
    """The backbone that the command line names, as :func:`training.subject.load_subject`."""
    if len(set(args.classes)) != len(args.classes):
        raise ValueError(f"--classes names a class twice: {', '.join(args.classes)}")
    seed = args.seed if args.random else 0
    return load_subject(args.model, random=args.random, seed=seed, weights=args.weights, size=size)


def has_fresh_fc(subject: Subject, network: nn.Module) -> bool:
    """Whether a transferred network has fc6 and fc7 that its subject's weights have not, or of another width."""
    wanted = getattr(getattr(network, "head", None), "fc_size", 0)
    return bool(wanted) and wanted != getattr(getattr(subject.backbone, "head", None), "fc_size", 0)


def transfer_row(subject: Subject, network: nn.Module, value: float, started: float, **fields: Any) -> Row:
    """The row of a number that is no count: a mean of precisions or overlaps, begun at ``started`` (monotonic)."""
    return Row(
        weights=subject.name,
        value=value,
        source="measured",
        sha256=subject.sha256,
        commit=current_commit(),
        versions=library_versions() | {"torchvision": torchvision.__version__},
        device=device_name(next(network.parameters()).device),
        threads=torch.get_num_threads(),
        seconds=round(time.monotonic() - started, 1),
        **fields,
    )


def settings_text(args: argparse.Namespace, training: Training, subject: Subject, network: nn.Module) -> str:
    """What a row says of its training, in a few words: data, steps, and what was done to the network before."""
    fc_size = getattr(getattr(network, "head", None), "fc_size", 0)
    parts = [
        f"trained on {args.train}",
        f"{training.steps:,} steps of {training.images_per_step} images",
        f"rate {training.lr:g}",
        f"{'fresh ' if has_fresh_fc(subject, network) else ''}fc6 and fc7 of {fc_size:,}" if fc_size else "",
        "batch norm folded",
        "" if args.no_rescale else "layers rescaled",
    ]
    return ", ".join(filter(None, parts))


def keep_numbers(
    output: Path, rows: Sequence[Row], by_class: dict[str, Sequence[float]], classes: Sequence[str]
) -> None:
    """Write rows and their report into a folder, print them, and the numbers of every class, in percent.

    Args:
        output: the folder.
        rows: the means.
        by_class: of each row's protocol the numbers of the classes.
        classes: their names, as many.
    """
    names = [name for name, value in zip(classes, next(iter(by_class.values())), strict=True) if value == value]
    tqdm.write(f"  {'':24s}{' '.join(f'{name[:8]:>8s}' for name in names)}")
    for title, values in by_class.items():
        known = [f"{100 * value:8.1f}" for value in values if value == value]
        tqdm.write(f"  {title:24s}{' '.join(known)}")
    for row in rows:
        keep_row(row, output / "rows.jsonl")
    write_report(output, output / "rows.jsonl")


def averages(by_class: dict[str, Sequence[float]]) -> dict[str, float]:
    """The mean over classes of each kind of number."""
    return {kind: mean_over_classes(values) for kind, values in by_class.items()}


def _loaded(load: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return load(*arguments)
    except (ValueError, OSError) as error:
        # handed on: out of another process it would come as that process's traceback
        return error
