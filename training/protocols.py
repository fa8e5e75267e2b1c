"""How numbers are measured: every probe and every transfer is a named recipe, a complete, frozen value.

Change one with ``dataclasses.replace``.
"""

import dataclasses
from dataclasses import dataclass

from rotation_ssl.pretraining.recipe import StepSchedule, check_field


@dataclass(frozen=True)
class TransferRecipe:
    """How a backbone up to one layer and a classifier on it are trained on labels: SGD, ``images`` crops in all.

    ``start`` is 'frozen' (the backbone stays as it is), 'trained' (it is trained too, at ``backbone_lr``) or 'random'
    (it starts from random weights and is trained: the supervised baseline). ``classifier`` is 'convolutional' or
    'non-linear', as the probes are. Each step takes a random crop of the padded images, half of them mirrored.
    ``precision`` is 'fp32', 'bf16' for autocast, or 'auto': bf16 where the device multiplies it, fp32 elsewhere.
    """

    name: str
    protocol: str
    cost: str
    start: str
    classifier: str
    images: int
    schedule: StepSchedule
    lr: float = 0.1
    backbone_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    padding: int = 4
    padding_mode: str = "constant"
    precision: str = "fp32"


PAPER_IMAGES = 100 * 50_000  # the authors draw 50,000 images an epoch however few are labelled
CPU_IMAGES = 600 * 128  # 5 to 12 minutes on 2 cores
CONVOLUTIONAL_SCHEDULE = StepSchedule(milestones=(0.35, 0.7, 0.85), factor=0.2)
NONLINEAR_SCHEDULE = StepSchedule(milestones=(0.2, 0.4, 0.45), factor=0.2)

FEW_LABELS_CPU = TransferRecipe(
    name="few-labels-cpu",
    protocol="few labels, convolutional probe",
    cost="cpu",
    start="frozen",
    classifier="convolutional",
    images=CPU_IMAGES,
    schedule=CONVOLUTIONAL_SCHEDULE,
    precision="auto",
)
SUPERVISED_CPU = dataclasses.replace(FEW_LABELS_CPU, name="supervised-cpu", protocol="supervised", start="random")
# the paper prints no settings for its fine-tuned rows: the backbone at a tenth of the classifier's rate is ours
FINETUNE_CONVOLUTIONAL_CPU = dataclasses.replace(
    FEW_LABELS_CPU,
    name="finetune-conv-cpu",
    protocol="fine-tuned, convolutional probe",
    start="trained",
    backbone_lr=0.01,
)
FINETUNE_NONLINEAR_CPU = dataclasses.replace(
    FINETUNE_CONVOLUTIONAL_CPU,
    name="finetune-nonlinear-cpu",
    protocol="fine-tuned, non-linear probe",
    classifier="non-linear",
    schedule=NONLINEAR_SCHEDULE,
)
_CPU_TRANSFERS = (FEW_LABELS_CPU, SUPERVISED_CPU, FINETUNE_CONVOLUTIONAL_CPU, FINETUNE_NONLINEAR_CPU)
_PAPER_TRANSFERS = tuple(
    dataclasses.replace(
        recipe,
        name=recipe.name.replace("-cpu", "-paper"),
        cost="paper",
        images=PAPER_IMAGES,
        precision="fp32",
    )
    for recipe in _CPU_TRANSFERS
)
TRANSFERS = {recipe.name: recipe for recipe in (*_CPU_TRANSFERS, *_PAPER_TRANSFERS)}


@dataclass(frozen=True)
class LayerProbeRecipe:
    """How classifiers on several layers of a frozen backbone are trained in one pass over fresh crops: SGD on each.

    ``classifier`` is 'linear' (adaptive max-pooling to about 9,000 values, batch norm without scale and shift, a linear
    layer) or 'non-linear' (the rest of the network after the layer, anew, with fc layers of ``fc_size``). Images are
    squares of ``image_size`` pixels, of which random crops of 7/8 of the side are taken, half of them mirrored, and the
    central ones to measure on. ``milestones`` are the epochs at which the rate is multiplied by ``factor``.
    ``precision`` is 'fp32', 'bf16' for autocast of backbone and classifiers, or 'auto': bf16 where the device
    multiplies it, fp32 elsewhere.
    """

    name: str
    protocol: str
    cost: str
    classifier: str
    epochs: int
    milestones: tuple[int, ...]
    lr: float = 0.01
    factor: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 192
    image_size: int = 256
    fc_size: int = 4096
    precision: str = "fp32"
    note: str = ""


IMAGENET_LINEAR_PAPER = LayerProbeRecipe(
    name="imagenet-linear-paper",
    protocol="ImageNet linear probe",
    cost="paper",
    classifier="linear",
    epochs=35,
    milestones=(5, 15, 25),
    note="tables 5 and 6 of the paper, settings of the authors' code",
)
IMAGENET_NONLINEAR_PAPER = LayerProbeRecipe(
    name="imagenet-nonlinear-paper",
    protocol="ImageNet non-linear probe",
    cost="paper",
    classifier="non-linear",
    epochs=40,
    milestones=(10, 20, 30),
    note="table 4 of the paper, settings of the authors' code",
)
IMAGENET_LINEAR_CPU = dataclasses.replace(
    IMAGENET_LINEAR_PAPER,
    name="imagenet-linear-cpu",
    cost="cpu",
    epochs=10,
    milestones=(3, 6, 8),
    image_size=64,
    precision="auto",
    note="tables 5 and 6 of the paper, in fewer epochs, for 64-pixel images",
)
IMAGENET_NONLINEAR_CPU = dataclasses.replace(
    IMAGENET_NONLINEAR_PAPER,
    name="imagenet-nonlinear-cpu",
    cost="cpu",
    epochs=4,
    milestones=(2, 3),
    image_size=64,
    precision="auto",
    note="table 4 of the paper, in fewer epochs, for 64-pixel images",
)
LAYER_PROBES = {
    recipe.name: recipe
    for recipe in (IMAGENET_LINEAR_PAPER, IMAGENET_NONLINEAR_PAPER, IMAGENET_LINEAR_CPU, IMAGENET_NONLINEAR_CPU)
}


# PASCAL VOC (table 7 of the paper, which prints no settings): what comes from where is said at each recipe.


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
