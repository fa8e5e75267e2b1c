"""Recipes of the evaluations, as frozen dataclasses; change one with ``dataclasses.replace``."""

import dataclasses
from dataclasses import dataclass

from rotation_ssl.pretraining.recipe import StepSchedule


@dataclass(frozen=True)
class FinetuneRecipe:
    """How a backbone up to one layer and a classifier on it are trained on labels: by SGD on ``images`` crops in total.

    ``start`` is 'frozen' (only the classifier is trained), 'trained' (the backbone too, with the learning rate
    ``backbone_lr``) or 'random' (all of it, from random weights: the supervised baseline). ``classifier`` is
    'convolutional' or 'non-linear', as the probes. Each step takes random crops of the padded images, half of them
    mirrored. ``precision`` is 'fp32', 'bf16' for autocast, or 'auto': bf16 if the device supports it, else fp32.
    """

    name: str
    protocol: str
    budget: str
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


AUTHORS_EPOCH = 50_000  # images that the authors draw in an epoch, however few labels there are
CPU_IMAGES = 600 * 128  # 5 to 12 minutes on 2 cores
CONVOLUTIONAL_SCHEDULE = StepSchedule(milestones=(0.35, 0.7, 0.85), factor=0.2)
NONLINEAR_SCHEDULE = StepSchedule(milestones=(0.2, 0.4, 0.45), factor=0.2)

FEW_LABELS_CPU = FinetuneRecipe(
    name="few-labels-cpu",
    protocol="few-labels",
    budget="cpu",
    start="frozen",
    classifier="convolutional",
    images=CPU_IMAGES,
    schedule=CONVOLUTIONAL_SCHEDULE,
    precision="auto",
)
SUPERVISED_CPU = dataclasses.replace(FEW_LABELS_CPU, name="supervised-cpu", protocol="supervised", start="random")
# the paper gives no settings for its fine-tuned rows: a tenth of the classifier's rate for the backbone is our choice
FINETUNE_CONVOLUTIONAL_CPU = dataclasses.replace(
    FEW_LABELS_CPU,
    name="finetune-conv-cpu",
    protocol="finetune-conv",
    start="trained",
    backbone_lr=0.01,
)
FINETUNE_NONLINEAR_CPU = dataclasses.replace(
    FINETUNE_CONVOLUTIONAL_CPU,
    name="finetune-nonlinear-cpu",
    protocol="finetune-nonlinear",
    classifier="non-linear",
    schedule=NONLINEAR_SCHEDULE,
)
_CPU_FINETUNES = (FEW_LABELS_CPU, SUPERVISED_CPU, FINETUNE_CONVOLUTIONAL_CPU, FINETUNE_NONLINEAR_CPU)
_PAPER_FINETUNES = {
    recipe.protocol: dataclasses.replace(
        recipe,
        name=recipe.name.replace("-cpu", "-paper"),
        budget="paper",
        images=100 * AUTHORS_EPOCH,
        precision="fp32",
    )
    for recipe in _CPU_FINETUNES
}
# the authors train this one twice as long, and lower its rate after 60, 120 and 160 of 200 epochs
_PAPER_FINETUNES["supervised"] = dataclasses.replace(
    _PAPER_FINETUNES["supervised"],
    images=200 * AUTHORS_EPOCH,
    schedule=StepSchedule(milestones=(0.3, 0.6, 0.8), factor=0.2),
)
FINETUNES = {recipe.name: recipe for recipe in (*_CPU_FINETUNES, *_PAPER_FINETUNES.values())}


@dataclass(frozen=True)
class LayerProbeRecipe:
    """How classifiers on several layers of a frozen backbone are trained by SGD, all on the same new crops.

    ``classifier`` is 'linear' (adaptive max-pooling to about 9,000 values, batch norm without scale and shift, a linear
    layer) or 'non-linear' (the retrained rest of the network after the layer, with fc layers of ``fc_size``). Images
    are squares of ``image_size`` pixels. Training uses random crops of 7/8 of their side, half of them mirrored, tests
    use the central crop. At the epochs ``milestones`` the learning rate is multiplied by ``factor``. ``precision`` is
    'fp32', 'bf16' for autocast of backbone and classifiers, or 'auto': bf16 if the device supports it, else fp32.
    """

    name: str
    protocol: str
    budget: str
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
    protocol="linear-sgd",
    budget="paper",
    classifier="linear",
    epochs=35,
    milestones=(5, 15, 25),
    note="tables 5 and 6 of the paper, settings of the authors' code",
)
IMAGENET_NONLINEAR_PAPER = LayerProbeRecipe(
    name="imagenet-nonlinear-paper",
    protocol="nonlinear-sgd",
    budget="paper",
    classifier="non-linear",
    epochs=40,
    milestones=(10, 20, 30),
    note="table 4 of the paper, settings of the authors' code",
)
IMAGENET_LINEAR_CPU = dataclasses.replace(
    IMAGENET_LINEAR_PAPER,
    name="imagenet-linear-cpu",
    budget="cpu",
    epochs=10,
    milestones=(3, 6, 8),
    image_size=64,
    precision="auto",
    note="tables 5 and 6 of the paper, in fewer epochs, for images of 64 to 146 pixels",
)
IMAGENET_NONLINEAR_CPU = dataclasses.replace(
    IMAGENET_NONLINEAR_PAPER,
    name="imagenet-nonlinear-cpu",
    budget="cpu",
    epochs=4,
    milestones=(2, 3),
    image_size=64,
    precision="auto",
    note="table 4 of the paper, in fewer epochs, for images of 64 to 146 pixels",
)
LAYER_PROBES = {
    recipe.name: recipe
    for recipe in (IMAGENET_LINEAR_PAPER, IMAGENET_NONLINEAR_PAPER, IMAGENET_LINEAR_CPU, IMAGENET_NONLINEAR_CPU)
}
