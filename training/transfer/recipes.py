"""Recipes of the PASCAL VOC transfers: of the paper's budget (table 7, which prints no settings) and of a CPU's.

Where each setting comes from is said at its recipe. Change one with ``dataclasses.replace``.
"""

import dataclasses
from dataclasses import dataclass

from rotation_ssl.pretraining.recipe import CosineSchedule, StepSchedule, check_field


@dataclass(frozen=True)
class Splits:
    """Which images: ``train`` and ``test`` are lists of ``VOC<year>/ImageSets``."""

    year: str
    train: str
    test: str


@dataclass(frozen=True)
class Training:
    """SGD with momentum: ``steps`` of ``images_per_step`` images; gradients of a norm above ``clip`` are shortened.

    Before, the layers are rescaled if ``rescale``; AlexNet's fc6 and fc7 are those of the weights, or fresh ones of
    ``fresh_fc_size`` where the weights have none; ``fc_size`` asks for a width, 0 for no such layers.
    ``precision`` is 'fp32', 'bf16' for autocast, or 'auto': bf16 where the device supports it, fp32 elsewhere.
    """

    steps: int
    images_per_step: int
    lr: float
    schedule: StepSchedule | CosineSchedule
    weight_decay: float
    momentum: float = 0.9
    clip: float = 10.0
    rescale: bool = True
    fc_size: int | None = None
    fresh_fc_size: int = 4096
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_field(self.steps >= 1, "steps", "at least 1", self.steps)
        check_field(self.images_per_step >= 1, "images_per_step", "at least 1", self.images_per_step)
        check_field(self.lr > 0, "lr", "above 0", self.lr)
        check_field(0 <= self.momentum < 1, "momentum", "0 up to 1", self.momentum)
        check_field(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        check_field(self.clip > 0, "clip", "above 0", self.clip)
        check_field(self.precision in ("auto", "fp32", "bf16"), "precision", "auto, fp32 or bf16", self.precision)


@dataclass(frozen=True)
class VocClassification:
    """Multi-label classification: random square crops of the image scaled by ``scales``, half of them mirrored, to
    ``size`` pixels (None: the model's own); the mean of ``test_crops`` such crops is measured. ``dropout`` is before
    the classifier and fc7.
    """

    name: str
    budget: str
    splits: Splits
    training: Training
    scales: tuple[float, float]
    test_crops: int
    dropout: float
    size: int | None
    protocol: str = "voc-classification"

    def __post_init__(self) -> None:
        check_field(0 < self.scales[0] <= self.scales[1], "scales", "two in order, above 0", self.scales)
        check_field(self.test_crops >= 1, "test_crops", "at least 1", self.test_crops)
        check_field(0 <= self.dropout < 1, "dropout", "0 up to 1", self.dropout)


@dataclass(frozen=True)
class VocDetection:
    """Detection: images whose shorter side is one of ``train_sides`` in training and ``test_side`` in the test, their
    longer side at most ``longest``; ``regions`` of every image are trained on, a quarter of them on objects, and the
    first ``test_proposals`` of the file are looked at in the test. ``overlap`` is the intersection over union above
    which the surer of two detections of a class replaces the other. ``dropout`` is after AlexNet's fc6 and fc7.
    """

    name: str
    protocol: str
    budget: str
    splits: Splits
    training: Training
    train_sides: tuple[int, ...]
    test_side: int
    longest: int
    regions: int
    overlap: float
    dropout: float
    test_proposals: int = 2000

    def __post_init__(self) -> None:
        sides = (*self.train_sides, self.test_side, self.longest)
        check_field(bool(self.train_sides) and min(sides) >= 1, "sides", "at least 1 pixel", sides)
        check_field(self.regions >= 4, "regions", "at least 4", self.regions)
        check_field(self.test_proposals >= 1, "test_proposals", "at least 1", self.test_proposals)
        check_field(0 < self.overlap < 1, "overlap", "between 0 and 1", self.overlap)
        check_field(0 <= self.dropout < 1, "dropout", "0 up to 1", self.dropout)


@dataclass(frozen=True)
class VocSegmentation:
    """Segmentation: whole images, half of them mirrored, padded to the largest of the step; dropout after fc6, fc7.

    Images whose longer side is above ``longest`` pixels are scaled down (None: never); the masks of the test are not.
    """

    name: str
    budget: str
    splits: Splits
    training: Training
    dropout: float
    longest: int | None = None
    protocol: str = "voc-segmentation"

    def __post_init__(self) -> None:
        check_field(self.longest is None or self.longest >= 1, "longest", "at least 1 pixel, or None", self.longest)
        check_field(0 <= self.dropout < 1, "dropout", "0 up to 1", self.dropout)


VOC2007 = Splits("2007", "trainval", "test")
CPU_TRAINING = Training(
    steps=3_000,
    images_per_step=4,
    lr=0.005,
    schedule=CosineSchedule(warmup=0.05),
    weight_decay=5e-4,
    fresh_fc_size=1024,
)
# steps, rate, its halving, weight decay, clipping, scales and crops as in philkr/voc-classification, the code of
# Kraehenbuehl et al. 2016; dropout of AlexNet (Krizhevsky et al. 2012)
VOC_CLASSIFICATION = VocClassification(
    name="voc-classification-paper",
    budget="paper",
    splits=VOC2007,
    training=Training(
        steps=80_000,
        images_per_step=16,
        lr=0.001,
        schedule=StepSchedule(milestones=tuple(k / 8 for k in range(1, 8)), factor=0.5),
        weight_decay=1e-6,
    ),
    scales=(0.5, 2.0),
    test_crops=10,
    dropout=0.5,
    size=224,
)
# about 20 minutes on one core with bf16; rates of 0.002 and 0.005 were equally good on val, 0.02 was worse
VOC_CLASSIFICATION_CPU = dataclasses.replace(
    VOC_CLASSIFICATION,
    name="voc-classification-cpu",
    budget="cpu",
    training=dataclasses.replace(CPU_TRAINING, images_per_step=32, weight_decay=1e-4),
    # crops of 128 pixels show as much of a photo as those of 224 do in the paper's recipe
    scales=(0.3, 1.2),
    size=None,
)
# images and regions a step, rate, weight decay, the five scales, overlap and dropout of Fast R-CNN (Girshick 2015); its
# 40,000 steps are taken three times over, which is ours: these weights know no objects
VOC_FAST_RCNN = VocDetection(
    name="voc-fast-rcnn-paper",
    protocol="voc-fast-rcnn",
    budget="paper",
    splits=VOC2007,
    training=Training(
        steps=120_000,
        images_per_step=2,
        lr=0.001,
        schedule=StepSchedule(milestones=(0.75,), factor=0.1),
        weight_decay=5e-4,
    ),
    train_sides=(480, 576, 688, 864, 1200),
    test_side=600,
    longest=2000,
    regions=64,
    overlap=0.3,
    dropout=0.5,
)
# Faster R-CNN is not in the paper: its settings are ours, after Fast R-CNN's, and so its budget has no name
VOC_FASTER_RCNN = dataclasses.replace(
    VOC_FAST_RCNN,
    name="voc-faster-rcnn",
    protocol="voc-faster-rcnn",
    budget="",
    train_sides=(480, 512, 544, 576, 600),
    longest=1000,
)
# about 40 minutes on one core with bf16; on train a rate of 0.015 had a higher loss all along
VOC_FAST_RCNN_CPU = dataclasses.replace(
    VOC_FAST_RCNN,
    name="voc-fast-rcnn-cpu",
    budget="cpu",
    training=CPU_TRAINING,
    train_sides=(320, 360, 400),
    test_side=360,
    longest=600,
    regions=32,
    test_proposals=300,
)
VOC_FASTER_RCNN_CPU = dataclasses.replace(
    VOC_FAST_RCNN_CPU, name="voc-faster-rcnn-cpu", protocol="voc-faster-rcnn", regions=64
)
# images a step, rate, weight decay and dropout of FCN-AlexNet (Long, Shelhamer, Darrell 2015); the steps are ours
VOC_SEGMENTATION = VocSegmentation(
    name="voc-segmentation-paper",
    budget="paper",
    # the paper does not name its splits
    splits=Splits("2012", "train", "val"),
    training=Training(
        steps=20_000,
        images_per_step=20,
        lr=0.001,
        schedule=StepSchedule(milestones=(0.5, 0.75), factor=0.1),
        weight_decay=5e-4,
    ),
    dropout=0.5,
)
# 15 minutes of steps at 0.77 s a core, in bf16; with --fc-size 0 a third of it; untuned
VOC_SEGMENTATION_CPU = dataclasses.replace(
    VOC_SEGMENTATION,
    name="voc-segmentation-cpu",
    budget="cpu",
    splits=VOC2007,
    training=dataclasses.replace(CPU_TRAINING, steps=1_200),
    longest=320,
)
VocRecipe = VocClassification | VocDetection | VocSegmentation
# by command and --budget
CLASSIFICATIONS = {"paper": VOC_CLASSIFICATION, "cpu": VOC_CLASSIFICATION_CPU}
FAST_RCNNS = {"paper": VOC_FAST_RCNN, "cpu": VOC_FAST_RCNN_CPU}
FASTER_RCNNS = {"paper": VOC_FASTER_RCNN, "cpu": VOC_FASTER_RCNN_CPU}
SEGMENTATIONS = {"paper": VOC_SEGMENTATION, "cpu": VOC_SEGMENTATION_CPU}
VOC_RECIPES: dict[str, VocRecipe] = {
    recipe.name: recipe
    for named in (CLASSIFICATIONS, FAST_RCNNS, FASTER_RCNNS, SEGMENTATIONS)
    for recipe in named.values()
}
