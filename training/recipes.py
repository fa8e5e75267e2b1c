"""The named recipes: how every published weight was pretrained, the paper's own, and what is compared with them.

Change one with ``dataclasses.replace``.
"""

import dataclasses

from rotation_ssl.backbones.about import network_facts
from rotation_ssl.pretraining.recipe import (
    FOLDER,
    LinearSchedule,
    Muon,
    Recipe,
    Sgd,
    Stage,
    StepSchedule,
    with_steps,
)

CIFAR10_STEPS_PER_EPOCH = 50_000 // 128

NIN_CIFAR10_CPU = Recipe(
    name="nin-cifar10-cpu",
    model="rotnet_nin",
    data="cifar10",
    stages=(Stage(steps=8400, crop=24), Stage(steps=3600, crop=32)),
    optimizer=Muon(lr=0.1),
    schedule=LinearSchedule(warmup=0.1),
    images_per_step=64,
    padding=2,
    precision="auto",
    note="see training/studies/nin_cifar10.md; about 150 minutes on 2 cores with native bf16",
)

NIN_CIFAR10_PAPER = Recipe(
    name="nin-cifar10-paper",
    model="rotnet_nin",
    data="cifar10",
    stages=(Stage(steps=100 * CIFAR10_STEPS_PER_EPOCH, crop=32),),
    optimizer=Sgd(),
    schedule=StepSchedule(milestones=(0.3, 0.6, 0.8), factor=0.2),
    padding_mode="constant",
    note="section 4.1 of the paper: 100 epochs, the learning rate divided by 5 at epochs 30, 60 and 80; for a GPU",
)

NIN_CIFAR10_AUTHORS = dataclasses.replace(
    NIN_CIFAR10_PAPER,
    name="nin-cifar10-authors",
    stages=(Stage(steps=200 * CIFAR10_STEPS_PER_EPOCH, crop=32),),
    note="config/CIFAR10_RotNet_NIN4blocks.py of the authors' code: 200 epochs, "
    "learning rate divided by 5 at epochs 60, 120 and 160; for a GPU",
)

# The ablations of the paper, all at one small budget: as many steps, and as many rotated images in each.

NIN_CIFAR10_ABLATION = dataclasses.replace(
    with_steps(NIN_CIFAR10_CPU, 400),
    name="nin-cifar10-ablation",
    note="table 2 of the paper: 0, 90, 180 and 270 degrees; about 6 minutes on 2 cores with native bf16",
)

NIN_CIFAR10_ABLATION_R0_180 = dataclasses.replace(
    NIN_CIFAR10_ABLATION,
    name="nin-cifar10-ablation-r0-180",
    rotations=(0, 2),
    images_per_step=128,
    note="table 2 of the paper: 0 and 180 degrees",
)

NIN_CIFAR10_ABLATION_R90_270 = dataclasses.replace(
    NIN_CIFAR10_ABLATION,
    name="nin-cifar10-ablation-r90-270",
    rotations=(1, 3),
    images_per_step=128,
    note="table 2 of the paper: 90 and 270 degrees",
)

NIN_CIFAR10_ABLATION_R8 = dataclasses.replace(
    NIN_CIFAR10_ABLATION,
    name="nin-cifar10-ablation-r8",
    rotations=tuple(range(8)),
    rotation_unit=45,
    images_per_step=32,
    note="table 2 of the paper: the multiples of 45 degrees",
)

NIN3_CIFAR10_ABLATION = dataclasses.replace(
    NIN_CIFAR10_ABLATION, name="nin3-cifar10-ablation", model="rotnet_nin3", note="table 1 of the paper: 3 blocks"
)

NIN5_CIFAR10_ABLATION = dataclasses.replace(
    NIN_CIFAR10_ABLATION, name="nin5-cifar10-ablation", model="rotnet_nin5", note="table 1 of the paper: 5 blocks"
)

IMAGENET_IMAGES, PLACES205_IMAGES = network_facts("rotnet_alexnet").paper_images, 2_448_873
ALEXNET_IMAGES_PER_STEP = 192

ALEXNET_IMAGENET_PAPER = Recipe(
    name="alexnet-imagenet-paper",
    model="rotnet_alexnet",
    data="folder",
    image_size=256,
    stages=(Stage(steps=30 * (IMAGENET_IMAGES // ALEXNET_IMAGES_PER_STEP), crop=224),),
    optimizer=Sgd(lr=0.01),
    schedule=StepSchedule(milestones=(10 / 30, 20 / 30), factor=0.1),
    images_per_step=ALEXNET_IMAGES_PER_STEP,
    padding=0,
    scale=(0.08, 1.0),
    note="section 4.2 of the paper: 30 epochs, learning rate divided by 10 at epochs 10 and 20; "
    "--data contains train/<class>/*; for a GPU",
)

ALEXNET_IMAGENET_AUTHORS = dataclasses.replace(
    ALEXNET_IMAGENET_PAPER,
    name="alexnet-imagenet-authors",
    stages=(Stage(steps=50 * (IMAGENET_IMAGES // ALEXNET_IMAGES_PER_STEP), crop=224),),
    schedule=StepSchedule(milestones=(15 / 50, 30 / 50, 45 / 50), factor=0.1),
    note="config/ImageNet_RotNet_AlexNet.py of the authors' code: 50 epochs, learning rate divided by 10 "
    "at epochs 15, 30 and 45; for a GPU",
)

ALEXNET_PLACES205_PAPER = dataclasses.replace(
    ALEXNET_IMAGENET_PAPER,
    name="alexnet-places205-paper",
    stages=(Stage(steps=30 * (PLACES205_IMAGES // ALEXNET_IMAGES_PER_STEP), crop=224),),
    note="the same settings on the images of Places205; for a GPU",
)

ALEXNET_PHOTOS_CPU = Recipe(
    name="alexnet-photos-cpu",
    model="rotnet_alexnet",
    model_args=(("fc_size", 0),),
    data="photos",
    image_size=192,
    stages=(Stage(steps=8000, crop=96), Stage(steps=2000, crop=128)),
    optimizer=Muon(lr=0.1),
    schedule=LinearSchedule(warmup=0.1),
    images_per_step=64,
    padding=0,
    scale=(0.35, 1.0),
    precision="auto",
    note="about 115 minutes on 2 cores with native bf16",
)

ALEXNET_ORIENTATION_CPU = dataclasses.replace(
    ALEXNET_PHOTOS_CPU,
    name="alexnet-orientation-cpu",
    model="rotnet_alexnet.photos",
    pretrained=True,
    data="photo-views",
    stages=(Stage(steps=800, crop=112), Stage(steps=200, crop=128)),
    optimizer=Muon(lr=0.03),
    note="trains rotnet_alexnet.photos further, for rotation-ssl orient; about 45 minutes on 2 cores in fp32",
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        NIN_CIFAR10_CPU,
        NIN_CIFAR10_PAPER,
        NIN_CIFAR10_AUTHORS,
        NIN_CIFAR10_ABLATION,
        NIN_CIFAR10_ABLATION_R0_180,
        NIN_CIFAR10_ABLATION_R90_270,
        NIN_CIFAR10_ABLATION_R8,
        NIN3_CIFAR10_ABLATION,
        NIN5_CIFAR10_ABLATION,
        ALEXNET_IMAGENET_PAPER,
        ALEXNET_IMAGENET_AUTHORS,
        ALEXNET_PLACES205_PAPER,
        ALEXNET_PHOTOS_CPU,
        ALEXNET_ORIENTATION_CPU,
        FOLDER,
    )
}
