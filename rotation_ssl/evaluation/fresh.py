"""Train probes on new crops every epoch: each pass of the frozen backbone feeds the probes of all layers.

This is the paper's protocol. Nothing is stored but the probes: memory does not grow with images, layers or epochs.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from rotation_ssl.evaluation.frozen import Frozen
from rotation_ssl.evaluation.protocols import ProbeRecipe
from rotation_ssl.fit import Checkpoint, fit
from rotation_ssl.labelled import LabelledImages
from rotation_ssl.models import weights_digest
from rotation_ssl.precision import autocast_type
from rotation_ssl.pretraining.augment import crop_and_flip
from rotation_ssl.pretraining.images import fingerprint
from rotation_ssl.progress import progress


@dataclasses.dataclass(frozen=True)
class ProbeSpec:
    """A probe to train: its name in messages, its layer, its recipe, and the function that builds it from a map."""

    name: str
    layer: str
    recipe: ProbeRecipe
    build: Callable[[torch.Tensor], nn.Module]


def train_fresh(
    frozen: Frozen, train: LabelledImages, specs: Sequence[ProbeSpec], seed: int, checkpoint: Checkpoint | None = None
) -> nn.ModuleList:
    """Train probes on several layers together, each on its own loss; they are in eval mode afterwards.

    Args:
        frozen: the backbone.
        train: the training images.
        specs: their recipes, none of whose precision is 'auto', differ in milestones and learning rates alone.
        seed: of the order and the crops.
        checkpoint: where the state is saved between epochs, and resumed from; its identity is
            :func:`training_identity`.

    Returns:
        A probe for each spec, on the backbone's device.

    Raises:
        ValueError: recipes that do not go together, or a loss that is not finite.
    """
    shared = _shared(specs)
    maps = frozen.whole_maps(list(dict.fromkeys(spec.layer for spec in specs)))
    example = maps(train.images[:1])
    probes = nn.ModuleList()
    for spec in specs:
        torch.manual_seed(seed)
        probes.append(spec.build(example[spec.layer]))
    probes.to(frozen.device)
    optimizer = torch.optim.SGD(
        [{"params": list(probe.parameters())} for probe in probes],
        shared.lr, momentum=shared.momentum, weight_decay=shared.weight_decay, nesterov=shared.momentum > 0, fused=True,
    )  # fmt: skip
    state = checkpoint or Checkpoint()
    state.restore(probes=probes, optimizer=optimizer)
    images = LabelledImages(train.images.to(frozen.device), train.labels.to(frozen.device), train.classes)

    def loss_of(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        crops, labels = batch
        found = maps(crops)
        logits = [probe(found[spec.layer]).float() for probe, spec in zip(probes, specs, strict=True)]
        return torch.stack([F.cross_entropy(each, labels) for each in logits])

    with progress(f"{len(specs)} probes", shared.epochs * len(train), initial=state.done * len(train)) as bar:
        for epoch in range(state.done, shared.epochs):
            for group, spec in zip(optimizer.param_groups, specs, strict=True):
                passed = sum(epoch >= milestone for milestone in spec.recipe.milestones)
                group["lr"] = spec.recipe.lr * spec.recipe.factor**passed
            batches = _crops(images, shared, epoch_generator(seed, epoch), bar.update)
            name = f"the probes in epoch {epoch + 1}"
            fit(probes, batches, loss_of, optimizer, name=name, autocast=autocast_type(shared.precision), quiet=True)
            state.save(epoch + 1, at_once=epoch + 1 == shared.epochs)
    return probes.eval()


def training_identity(frozen: Frozen, train: LabelledImages, specs: Sequence[ProbeSpec], seed: int) -> str:
    """All that decides the probes but machine and library versions, in one line."""
    weights = f"{type(frozen.backbone).__name__} {weights_digest(frozen.backbone)}"
    trained = "; ".join(f"{spec.name} {spec.recipe}" for spec in specs)
    data = f"images {fingerprint(train.images)}, labels {fingerprint(train.labels)}"
    settings = f"{frozen.size} pixels, features in {frozen.precision}, seed {seed}"
    return f"{weights}, {settings}, {data}: {trained}"


def shuffled_batches(count: int, size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """The indices 0..count - 1 in random order, in batches of ``size``; a last batch of one is left out."""
    parts = torch.randperm(count, generator=generator).split(size)
    # batch norm cannot normalise a batch of one image
    return [part for part in parts if len(part) > 1]


def epoch_generator(seed: int | None, epoch: int) -> torch.Generator:
    """The random numbers of an epoch, so that it can be trained without those before it."""
    return torch.Generator().manual_seed(1000 * (seed or 0) + epoch)


def _crops(
    images: LabelledImages, recipe: ProbeRecipe, generator: torch.Generator, show: Callable[[int], object]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An epoch's crops (B, 3, H, H) uint8 and labels (B,), on the images' device."""
    side = images.images.shape[-1]
    for chosen in shuffled_batches(len(images), recipe.batch_size, generator):
        own = chosen.to(images.images.device)
        squares = images.images[own]
        yield (
            crop_and_flip(squares, side, recipe.padding, recipe.padding_mode, True, generator),
            images.labels[own],
        )
        show(len(chosen))


def _shared(specs: Sequence[ProbeSpec]) -> ProbeRecipe:
    """What the recipes have in common, as the first of them."""
    first, *others = (dataclasses.replace(spec.recipe, milestones=(), lr=0.0) for spec in specs)
    if any(other != first for other in others):
        names = ", ".join(spec.name for spec in specs)
        raise ValueError(f"{names} cannot be trained together: their recipes differ in more than rates and milestones")
    return dataclasses.replace(first, lr=specs[0].recipe.lr)
