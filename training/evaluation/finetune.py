"""Train with labels: fine-tuning, few labels on frozen features, and the supervised baseline.

    python -m training finetune few-labels-cpu rotnet_nin.cifar10 --labels-per-class 20 100 400 1000 5000 --data DIR
    python -m training finetune supervised-cpu rotnet_nin --labels-per-class 20 100 400 1000 5000 --data DIR
    python -m training finetune finetune-conv-cpu rotnet_nin.cifar10 --data DIR

The network is the backbone up to one layer (block2 is recommended) and a classifier on it. With the convolutional
classifier on block2 it is the paper's NIN of three blocks, which is also the paper's supervised baseline. Recipes that
end in -paper train on 5,000,000 crops (supervised-paper on 10,000,000) as the authors do, those that end in -cpu on a
small fixed number; --images overrides it. --labels-per-class takes the first K images of each class, as in the paper,
or K random ones per seed (--draw random). Without --labels-per-class all training images are used. The final network is
tested, not the best one.

MODEL is any timm model, with its published weights, --random weights, or the weights of a file (--weights FILE). DIR
contains CIFAR-10; use --dataset folder for other images. Results are written to --output: rows.jsonl, report.md,
report.json and report.png. To resume an interrupted command, run it again with the same options and --output.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, RandomSampler

from rotation_ssl.cli.options import positive
from rotation_ssl.evaluation.frozen import PARTS, preparation
from rotation_ssl.features import layer_modules
from rotation_ssl.fit import Checkpoint, Checkpoints, fit
from rotation_ssl.labelled import LabelledImages, LabelledSplits, labels_subset
from rotation_ssl.messages import counted
from rotation_ssl.models import recommended_layer
from rotation_ssl.precision import autocast_type, resolved, warn_if_emulated
from rotation_ssl.pretraining.augment import crop_and_flip, draw_windows
from rotation_ssl.pretraining.optim import create_scheduler
from rotation_ssl.probes import convolutional_probe, nonlinear_probe
from rotation_ssl.progress import progress
from training.command import create_parser
from training.evaluation import options
from training.evaluation.labelled import identity_of
from training.evaluation.recipes import FINETUNES, FinetuneRecipe
from training.evaluation.subject import Subject, load_subject, measured_row
from training.protocols import PROTOCOLS
from training.reporting.report import keep_rows, run_measuring
from training.reporting.rows import Row


def measure_finetuned(
    recipe: FinetuneRecipe,
    subject: Subject,
    layer: str,
    images: LabelledSplits,
    labels_per_class: int | None = None,
    draw: str = "first",
    seed: int = 0,
    device: str = "cpu",
    checkpoints: Checkpoints | None = None,
) -> Row:
    """Train a recipe's network on labelled images and test it.

    Args:
        recipe: all settings of the training; the row says which precision 'auto' became, and the accuracy on the
            training images themselves.
        subject: the backbone, which the training changes.
        layer: last layer of the backbone that is kept.
        labels_per_class: K labelled images of each class; None: all.
        draw: 'first' or 'random', which K images of a class.
        seed: of the classifier, the order, the crops and the random draw.
        checkpoints: where the training is saved, and resumed from; None: nothing is saved.
    """
    recipe = resolved(recipe, device)
    if recipe.images < recipe.batch_size:
        raise ValueError(f"{recipe.name} takes {recipe.batch_size} images a step, --images {recipe.images} is too few")
    train = images.train
    if labels_per_class is not None:
        generator = None if draw == "first" else torch.Generator().manual_seed(seed)
        train = labels_subset(train, labels_per_class, generator)
    identity = f"{subject.identity}, {recipe}, {layer}, seed {seed}, {identity_of(train)}"
    checkpoint = (checkpoints or Checkpoints()).open(identity)
    started = time.monotonic() - checkpoint.seconds
    network = build_network(recipe, subject, layer, len(train.classes), seed).to(device)
    network.to(memory_format=torch.channels_last)
    prepare = preparation(subject.backbone, subject.size)
    autocast = autocast_type(recipe.precision)
    train_network(recipe, network, train, prepare, seed, autocast, checkpoint)
    learned, right = (predict(network, part, prepare, autocast) == part.labels for part in (train, images.test))
    crops = recipe.images // recipe.batch_size * recipe.batch_size
    settings = (
        f"{crops:,} crops seen, {recipe.classifier} classifier, {recipe.start} backbone, {recipe.precision}, "
        f"training accuracy {100 * float(learned.double().mean()):.1f} %"
    )
    return measured_row(
        subject,
        [int(part.sum()) for part in right.tensor_split(PARTS)],
        len(right),
        images.name,
        settings,
        time.monotonic() - started,
        protocol=recipe.protocol,
        budget=recipe.budget,
        layer=layer,
        labels_per_class=labels_per_class,
        draw=draw if labels_per_class is not None else "",
        seed=seed,
    )


class LayerClassifier(nn.Module):
    """A backbone up to one layer and a classifier on its map: images (N, C, H, W) -> logits (N, K).

    A frozen backbone always stays in eval mode and gets no gradients.
    """

    def __init__(self, backbone: nn.Module, index: int, classifier: nn.Module, frozen: bool) -> None:
        super().__init__()
        self.backbone, self.index, self.classifier, self.frozen = backbone, index, classifier, frozen
        self.backbone.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "LayerClassifier":
        """Set the mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """The layer's map (N, C, H', W')."""
        taken: Any = self.backbone
        return taken.forward_intermediates(images, [self.index], stop_early=True, intermediates_only=True)[0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, K)."""
        return self.classifier(self.maps(images))


def build_network(
    recipe: FinetuneRecipe, subject: Subject, layer: str, num_classes: int, seed: int = 0
) -> LayerClassifier:
    """The recipe's network, in eval mode. The layers after ``layer`` are removed from the subject's backbone."""
    backbone: Any = subject.backbone
    layers = layer_modules(backbone)
    if layer not in layers:
        raise ValueError(f"no layer {layer} in this backbone; it has {', '.join(layers)}")
    if not hasattr(backbone, "forward_intermediates") or not hasattr(backbone, "prune_intermediate_layers"):
        raise ValueError(f"{subject.name} cannot be cut at a layer: it has no forward_intermediates")
    index = [entry["module"] for entry in backbone.feature_info].index(layers[layer])
    (index,) = backbone.prune_intermediate_layers([index]) or [index]
    torch.manual_seed(seed)
    frozen = recipe.start == "frozen"
    network = LayerClassifier(backbone, index, nn.Identity(), frozen).eval()
    with torch.no_grad():
        device = next(backbone.parameters()).device
        example = network.maps(torch.zeros(1, 3, subject.size, subject.size, device=device))
    width = example.shape[1]
    network.classifier = (
        convolutional_probe(width, num_classes)
        if recipe.classifier == "convolutional"
        else nonlinear_probe(example[0].numel(), num_classes)
    )
    return network


def train_network(
    recipe: FinetuneRecipe,
    network: LayerClassifier,
    train: LabelledImages,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    seed: int = 0,
    autocast: torch.dtype | None = None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Train the network in place on random crops of the labelled images; it is in eval mode afterwards.

    Args:
        network: on the device to train on.
        prepare: from uint8 crops (B, 3, H, H) to what the backbone takes.
        seed: of the order and the crops.
        autocast: compute in this type (torch.bfloat16); None: in the type of the weights.
        checkpoint: where the state is saved, and resumed from.
    """
    groups = [{"params": list(network.classifier.parameters()), "lr": recipe.lr}]
    if not network.frozen:
        lr = recipe.lr if recipe.start == "random" else recipe.backbone_lr
        groups.append({"params": list(network.backbone.parameters()), "lr": lr})
    optimizer = torch.optim.SGD(
        groups, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )
    steps = recipe.images // recipe.batch_size
    device = next(network.parameters()).device
    images, labels = train.images.to(device), train.labels.to(device)
    # one generator for both: the order and the crops of a seed
    generator = torch.Generator().manual_seed(seed)
    # one permutation after the other
    order = RandomSampler(train, num_samples=steps * recipe.batch_size, generator=generator)
    batches, side = iter(BatchSampler(order, recipe.batch_size, drop_last=True)), images.shape[-1]

    def loss_of(chosen: list[int]) -> torch.Tensor:
        own = torch.tensor(chosen, device=device)
        crops = crop_and_flip(images[own], side, recipe.padding, recipe.padding_mode, True, generator)
        return F.cross_entropy(network(prepare(crops)).float(), labels[own])

    scheduler, checkpoint = create_scheduler(recipe.schedule, optimizer, steps), checkpoint or Checkpoint()
    # drawn again: the generator is then where it was, in the middle of a permutation
    for chosen in islice(batches, checkpoint.done):
        draw_windows(len(chosen), side, side, recipe.padding, True, generator)
    checkpoint.restore(network=network, optimizer=optimizer, scheduler=scheduler)
    fit(
        network, batches, loss_of, optimizer, name=f"{recipe.name}, {counted(len(train), 'label')}",
        scheduler=scheduler, steps=steps, images_per_step=recipe.batch_size, autocast=autocast, checkpoint=checkpoint,
    )  # fmt: skip


def predict(
    network: nn.Module,
    images: LabelledImages,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    autocast: torch.dtype | None = None,
) -> torch.Tensor:
    """The classes that the network predicts for the images: (M,) int64."""
    device = next(network.parameters()).device
    parts = images.images.split(250)
    bar = progress("measuring", len(parts), "batch", parts)
    with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        logits = torch.cat([network(prepare(part.to(device))).cpu() for part in bar])
    if not logits.isfinite().all():
        raise ValueError("the network's logits are not finite: check the weights and the images")
    return logits.argmax(1)


def finetune_subject(recipe: FinetuneRecipe, model: str, training_seed: int, **options: Any) -> Subject:
    """The backbone that a recipe starts from.

    Args:
        recipe: one that starts from random weights takes those of ``training_seed``.
        model: as in :func:`training.evaluation.subject.load_subject`.
        options: of ``load_subject``.
    """
    if recipe.start != "random":
        return load_subject(model, **options)
    if options.get("weights"):
        raise ValueError(f"{recipe.name} starts from random weights: leave the weights file out")
    architecture = model.split(".", 1)[0]
    subject = load_subject(architecture, random=True, seed=training_seed, size=options.get("size"))
    return dataclasses.replace(subject, name=f"{architecture}.random")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    lines = (f"{r.name:24s} {PROTOCOLS[r.protocol].title}, {r.images:,} crops" for r in FINETUNES.values())
    parser = create_parser("finetune", __doc__, lines)
    parser.add_argument("recipe", choices=sorted(FINETUNES), metavar="RECIPE", help="one of the recipes below")
    options.add_model(parser)
    parser.add_argument("--layer", help="last layer of the backbone that is kept [the recommended one]")
    parser.add_argument(
        "--labels-per-class", type=positive, nargs="+", metavar="K", help="labelled images of each class [all]"
    )
    parser.add_argument(
        "--draw", choices=("first", "random"), default="first", help="which K images of a class [%(default)s]"
    )
    parser.add_argument("--images", type=positive, metavar="N", help="train on N crops in total [the recipe's]")
    options.add_data(parser)
    options.add_run(parser, "runs/finetune")
    args = parser.parse_args(arguments)
    return run_measuring(lambda: _measure(args), args.device)


def _measure(args: argparse.Namespace) -> Path:
    """Train and measure what the options ask for; returns the file of the rows."""
    warn_if_emulated(args.precision, args.device)
    recipe = _recipe(args)
    subject = _subject(recipe, args, args.seed)
    layer = args.layer or recommended_layer(subject.backbone, subject.name, "--layer")
    cifar10 = args.dataset == "cifar10" and not args.holdout and not args.size
    file = options.rows_file(args, subject, not cifar10 or not recipe.budget)
    # what the options ask for in vain is an error now, not after the first training
    build_network(recipe, subject, layer, num_classes=2)
    images = options.images_of(args, subject.size)
    for labels in args.labels_per_class or []:
        labels_subset(images.train, labels)
    trainings = [(labels, seed) for labels in args.labels_per_class or [None] for seed in options.seeds(args)]
    bar = progress("trainings", len(trainings), "training", trainings, disable=len(trainings) == 1)
    checkpoints = Checkpoints(options.output_of(args, subject))
    rows = (
        measure_finetuned(
            recipe, _subject(recipe, args, seed), layer, images, labels, args.draw, seed, args.device, checkpoints
        )
        for labels, seed in bar
    )
    return keep_rows(rows, file, checkpoints)


def _recipe(args: argparse.Namespace) -> FinetuneRecipe:
    """The recipe with what the options change, on the device."""
    given = {"images": args.images, "precision": args.precision}
    named = FINETUNES[args.recipe]
    recipe = dataclasses.replace(named, **{name: value for name, value in given.items() if value is not None})
    return options.own_recipe(named, recipe, args.device)


def _subject(recipe: FinetuneRecipe, args: argparse.Namespace, seed: int) -> Subject:
    """A backbone of its own for the training of a seed, which changes it; ``--random`` weights are those of --seed."""
    return finetune_subject(
        recipe, args.model, seed, random=args.random, seed=args.seed, weights=args.weights, size=args.size
    )
