"""How weights are pretrained: a recipe is a complete, frozen value; change one with ``dataclasses.replace``."""

import dataclasses
from dataclasses import dataclass
from typing import Any

#: Values of ``flip``.
FLIPS = ("none", "random", "alternate")
#: Values of ``padding_mode``.
PADDING_MODES = ("reflect", "constant")
#: Values of ``precision``.
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def check_field(good: bool, field: str, expected: str, value: object) -> None:
    """Refuse a value of a recipe's field that is not good.

    Raises:
        ValueError: the field's name, what was expected, and the value.
    """
    if not good:
        raise ValueError(f"{field} must be {expected}, got {value!r}")


def _one_of(choices: tuple[str, ...]) -> str:
    return " or ".join(map(repr, choices))


@dataclass(frozen=True)
class Stage:
    """A part of the run with its own crop: ``steps`` optimiser steps on square crops of ``crop`` pixels."""

    steps: int
    crop: int

    def __post_init__(self) -> None:
        check_field(self.steps >= 1, "steps of a stage", "at least 1", self.steps)
        check_field(self.crop >= 1, "crop of a stage", "at least 1 pixel", self.crop)


@dataclass(frozen=True)
class Sgd:
    """SGD with Nesterov momentum on all parameters, as in the paper."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        check_field(self.lr > 0, "lr", "above 0", self.lr)
        check_field(0 < self.momentum < 1, "momentum", "between 0 and 1 (Nesterov's needs some)", self.momentum)
        check_field(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)


@dataclass(frozen=True)
class Muon:
    """Muon on the convolution filters, Nesterov SGD on the rest.

    The plain update: orthogonalised momentum times ``lr``, no scaling by shape. Before each step every filter bank is
    scaled to the norm sqrt(out channels), so that ``lr`` is about a relative step whatever the layer; batch norm after
    each convolution makes the function independent of that scale.
    """

    lr: float
    momentum: float = 0.6
    rest: Sgd = Sgd()

    def __post_init__(self) -> None:
        check_field(self.lr > 0, "lr", "above 0", self.lr)
        check_field(0 <= self.momentum < 1, "momentum", "0 up to 1", self.momentum)


@dataclass(frozen=True)
class AdamW:
    """AdamW on all parameters, for backbones whose learning rate has not been tuned."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        check_field(self.lr > 0, "lr", "above 0", self.lr)
        check_field(all(0 <= beta < 1 for beta in self.betas), "betas", "0 up to 1", self.betas)
        check_field(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)


@dataclass(frozen=True)
class LinearSchedule:
    """Learning rate with linear warm-up over the fraction ``warmup`` of the steps, constant over the fraction ``hold``,
    then linearly down to 0 (constant to the end if ``warmup + hold`` is 1).
    """

    warmup: float
    hold: float = 0.0

    def __post_init__(self) -> None:
        check_field(min(self.warmup, self.hold) >= 0, "warmup and hold", "0 or more", (self.warmup, self.hold))
        check_field(self.warmup + self.hold <= 1, "warmup and hold together", "at most 1", self.warmup + self.hold)


@dataclass(frozen=True)
class CosineSchedule:
    """Learning rate from 0 up to its peak during the first ``warmup`` of the steps, then down to 0 by half a cosine."""

    warmup: float

    def __post_init__(self) -> None:
        check_field(0 <= self.warmup < 1, "warmup", "0 up to 1", self.warmup)


@dataclass(frozen=True)
class StepSchedule:
    """Learning rate multiplied by ``factor`` at each of the ``milestones``, fractions of the steps."""

    milestones: tuple[float, ...]
    factor: float

    def __post_init__(self) -> None:
        inside = all(0 < milestone < 1 for milestone in self.milestones)
        check_field(inside, "milestones", "fractions of the steps, between 0 and 1", self.milestones)
        check_field(self.factor > 0, "factor", "above 0", self.factor)


@dataclass(frozen=True)
class Recipe:
    """All settings of a pretraining run; with machine, thread count and library versions they decide the weights.

    Images are cropped, half of them are mirrored, and then each is rotated. An epoch is a permutation of the training
    images without its incomplete last batch; of tar shards some are read at a time.

    Args:
        name: name of the recipe.
        model: a timm model.
        data: a name of ``rotation_ssl.pretraining.images.open_images``, or of one of the lab's datasets.
        stages: parts of the run, each with its own crop size.
        optimizer: its settings.
        schedule: learning-rate schedule.
        images_per_step: upright images of a batch, which has ``images_per_step * len(rotations)`` rotated ones.
        rotations: multiples of ``rotation_unit``.
        rotation_unit: degrees. 90 only moves pixels; 45, with all eight rotations, resamples them and masks the image
            to its inscribed circle.
        padding: pixels on all sides before a crop is taken at a random position.
        padding_mode: 'reflect' or 'constant'.
        flip: 'none', 'random' (each crop with probability 1/2) or 'alternate' (an image is mirrored in every other of
            its epochs, the first one at random).
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        average: decay of an exponential moving average (EMA) of the weights, which is then what is saved, with batch
            norm statistics recomputed; 0: no EMA.
        precision: 'fp32', 'bf16' or 'fp16' (both by autocast), or 'auto': bf16 where the hardware supports it (a GPU
            that supports bf16, or a CPU with ``avx512_bf16``, ``amx_bf16`` or, on Arm, ``bf16``), else fp32 (emulated
            bf16 is 6 to 15 times slower).
        holdout: number of images, the last ones, that are not trained on: tune on them, never on the test set.
        seed: random seed.
        note: what to know of the recipe, such as its cost.
        image_size: side of the square images in pixels.
        scale: smallest and largest share of the image's area that a crop has, which is resized to the stage's pixels
            (torchvision's RandomResizedCrop); None: crops of the stage's pixels.
        model_args: arguments of the model in addition to its number of classes, as pairs.
        pretrained: begin with the model's pretrained weights instead of random ones.
    """

    name: str
    model: str
    data: str
    stages: tuple[Stage, ...]
    optimizer: Sgd | Muon | AdamW
    schedule: LinearSchedule | CosineSchedule | StepSchedule
    images_per_step: int = 128
    rotations: tuple[int, ...] = (0, 1, 2, 3)
    rotation_unit: int = 90
    padding: int = 4
    padding_mode: str = "reflect"
    flip: str = "random"
    label_smoothing: float = 0.0
    average: float = 0.0
    precision: str = "fp32"
    holdout: int = 0
    seed: int = 0
    note: str = ""
    image_size: int = 32
    scale: tuple[float, float] | None = None
    model_args: tuple[tuple[str, int | tuple[int, ...]], ...] = ()
    pretrained: bool = False

    def __post_init__(self) -> None:
        check_field(len(self.stages) > 0, "stages", "at least one", self.stages)
        check_field(self.images_per_step >= 1, "images_per_step", "at least 1", self.images_per_step)
        check_field(self.image_size >= 1, "image_size", "at least 1 pixel", self.image_size)
        check_field(0 <= self.padding < self.image_size, "padding", "0 up to the image's pixels", self.padding)
        if self.scale is not None:
            ordered = len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1
            check_field(
                ordered, "scale", "two shares of the image's area, above 0 up to 1, the smaller one first", self.scale
            )
            check_field(self.padding == 0, "padding", "0 where crops have a scale", self.padding)
        widest = self.image_size + 2 * self.padding
        for stage in self.stages if self.scale is None else ():
            check_field(stage.crop <= widest, "crop of a stage", f"at most {widest}, image and padding", stage.crop)
        check_field(self.padding_mode in PADDING_MODES, "padding_mode", _one_of(PADDING_MODES), self.padding_mode)
        check_field(self.flip in FLIPS, "flip", _one_of(FLIPS), self.flip)
        check_field(0 <= self.label_smoothing < 1, "label_smoothing", "0 up to 1", self.label_smoothing)
        check_field(0 <= self.average < 1, "average", "0 up to 1", self.average)
        check_field(self.precision in PRECISIONS, "precision", _one_of(PRECISIONS), self.precision)
        check_field(self.holdout >= 0, "holdout", "0 or more images", self.holdout)
        check_field(self.seed >= 0, "seed", "0 or more", self.seed)
        check_field(self.seed < 2**64, "seed", "below 2**64", self.seed)
        check_field(self.rotation_unit in (45, 90), "rotation_unit", "90 or 45 degrees", self.rotation_unit)
        quarters = len(set(self.rotations)) == len(self.rotations) > 0 and set(self.rotations) <= {0, 1, 2, 3}
        if self.rotation_unit == 90:
            check_field(quarters, "rotations", "distinct values of 0, 1, 2, 3 (times 90 degrees)", self.rotations)
        if self.rotation_unit == 45 and self.rotations != tuple(range(8)):
            raise ValueError(f"rotations must be 0 to 7 in order where rotation_unit is 45, got {self.rotations}")

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return sum(stage.steps for stage in self.stages)

    @property
    def rotated_images(self) -> int:
        """Rotated images seen in the whole run."""
        return self.steps * self.images_per_step * len(self.rotations)

    @property
    def input_size(self) -> int:
        """Side in pixels of images for the trained network, ``image_size`` or, with ``scale``, the last crop."""
        return self.image_size if self.scale is None else self.stages[-1].crop

    def crop_at(self, step: int) -> int:
        """Crop size of step ``step``, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage.crop
            step -= stage.steps
        return self.stages[-1].crop


def field_defaults() -> dict[str, Any]:
    """The fields of a recipe that have a default: what a run that is older than one of them had."""
    return {f.name: f.default for f in dataclasses.fields(Recipe) if f.default is not dataclasses.MISSING}


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe in ``steps`` steps, each stage in proportion and at least one.

    Raises:
        ValueError: fewer steps than stages.
    """
    if steps < len(recipe.stages):
        raise ValueError(
            f"steps must be at least {len(recipe.stages)}, one for each stage of {recipe.name}, got {steps}"
        )
    stages: list[Stage] = []
    done = planned = 0
    for position, stage in enumerate(recipe.stages, 1):
        planned += stage.steps
        later = len(recipe.stages) - position  # stages that need a step each
        end = min(max(round(steps * planned / recipe.steps), done + 1), steps - later)
        stages.append(dataclasses.replace(stage, steps=end - done))
        done = end
    return dataclasses.replace(recipe, stages=tuple(stages))


def with_image_size(recipe: Recipe, size: int) -> Recipe:
    """The recipe on images of ``size`` pixels, crops and padding in proportion.

    Raises:
        ValueError: no size of an image.
    """
    check_field(size >= 1, "image_size", "at least 1 pixel", size)
    scale = size / recipe.image_size
    stages = tuple(dataclasses.replace(stage, crop=max(1, round(stage.crop * scale))) for stage in recipe.stages)
    padding = min(round(recipe.padding * scale), size - 1)
    if recipe.scale is None:
        stages = tuple(dataclasses.replace(stage, crop=min(stage.crop, size + 2 * padding)) for stage in stages)
    return dataclasses.replace(recipe, image_size=size, padding=padding, stages=stages)


#: The default recipe for your own images; not from the paper, and not tuned.
FOLDER = Recipe(
    name="folder",
    model="resnet18",
    data="folder",
    image_size=128,
    stages=(Stage(steps=10_000, crop=112),),
    optimizer=AdamW(),
    schedule=CosineSchedule(warmup=0.1),
    images_per_step=64,
    padding=0,
    precision="auto",
    note="a start for images of your own: change --model, --size and --steps",
)
