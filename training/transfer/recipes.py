"""Recipes of the PASCAL VOC transfers (table 7 of the paper, which prints no settings).

Where each setting comes from is said at its recipe. Change one with ``dataclasses.replace``.
"""

import dataclasses
from dataclasses import dataclass

from rotation_ssl.pretraining.recipe import StepSchedule, check_field


@dataclass(frozen=True)
class Training:
    """SGD with momentum: ``steps`` of ``images_per_step`` images; gradients of a norm above ``clip`` are shortened."""

    steps: int
    images_per_step: int
    lr: float
    schedule: StepSchedule
    weight_decay: float
    momentum: float = 0.9
    clip: float = 10.0

    def __post_init__(self) -> None:
        check_field(self.steps >= 1, "steps", "at least 1", self.steps)
        check_field(self.images_per_step >= 1, "images_per_step", "at least 1", self.images_per_step)
        check_field(self.lr > 0, "lr", "above 0", self.lr)
        check_field(0 <= self.momentum < 1, "momentum", "0 up to 1", self.momentum)
        check_field(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        check_field(self.clip > 0, "clip", "above 0", self.clip)


@dataclass(frozen=True)
class VocClassification:
    """Multi-label classification: random square crops of the image scaled by ``scales``, half of them mirrored, to the
    network's size; the mean of ``test_crops`` such crops is measured. ``dropout`` is before the classifier and fc7.
    """

    training: Training
    scales: tuple[float, float]
    test_crops: int
    dropout: float

    def __post_init__(self) -> None:
        check_field(0 < self.scales[0] <= self.scales[1], "scales", "two in order, above 0", self.scales)
        check_field(self.test_crops >= 1, "test_crops", "at least 1", self.test_crops)
        check_field(0 <= self.dropout < 1, "dropout", "0 up to 1", self.dropout)


@dataclass(frozen=True)
class VocDetection:
    """Detection: images whose shorter side is one of ``train_sides`` in training and ``test_side`` in the test, their
    longer side at most ``longest``; ``regions`` of every image are trained on, a quarter of them on objects.
    ``overlap`` is the intersection over union above which the surer of two detections of a class replaces the other.
    ``dropout`` is after AlexNet's fc6 and fc7.
    """

    training: Training
    train_sides: tuple[int, ...]
    test_side: int
    longest: int
    regions: int
    overlap: float
    dropout: float

    def __post_init__(self) -> None:
        sides = (*self.train_sides, self.test_side, self.longest)
        check_field(bool(self.train_sides) and min(sides) >= 1, "sides", "at least 1 pixel", sides)
        check_field(self.regions >= 4, "regions", "at least 4", self.regions)
        check_field(0 < self.overlap < 1, "overlap", "between 0 and 1", self.overlap)
        check_field(0 <= self.dropout < 1, "dropout", "0 up to 1", self.dropout)


@dataclass(frozen=True)
class VocSegmentation:
    """Segmentation: whole images, half of them mirrored, padded to the largest of the step; dropout after fc6, fc7."""

    training: Training
    dropout: float

    def __post_init__(self) -> None:
        check_field(0 <= self.dropout < 1, "dropout", "0 up to 1", self.dropout)


# steps, rate, its halving, weight decay, clipping, scales and crops as in philkr/voc-classification, the code of
# Kraehenbuehl et al. 2016; dropout of AlexNet (Krizhevsky et al. 2012)
VOC_CLASSIFICATION = VocClassification(
    Training(
        steps=80_000,
        images_per_step=16,
        lr=0.001,
        schedule=StepSchedule(milestones=tuple(k / 8 for k in range(1, 8)), factor=0.5),
        weight_decay=1e-6,
    ),
    scales=(0.5, 2.0),
    test_crops=10,
    dropout=0.5,
)
# images and regions a step, rate, weight decay, the five scales, overlap and dropout of Fast R-CNN (Girshick 2015); its
# 40,000 steps are taken three times over, which is ours: these weights know no objects
VOC_FAST_RCNN = VocDetection(
    Training(
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
# Faster R-CNN is not in the paper: its settings are ours, after Fast R-CNN's
VOC_FASTER_RCNN = dataclasses.replace(VOC_FAST_RCNN, train_sides=(480, 512, 544, 576, 600), longest=1000)
# images a step, rate, weight decay and dropout of FCN-AlexNet (Long, Shelhamer, Darrell 2015); the steps are ours
VOC_SEGMENTATION = VocSegmentation(
    Training(
        steps=20_000,
        images_per_step=20,
        lr=0.001,
        schedule=StepSchedule(milestones=(0.5, 0.75), factor=0.1),
        weight_decay=5e-4,
    ),
    dropout=0.5,
)
