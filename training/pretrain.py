"""Pretrain a backbone with a named recipe.

    python -m training pretrain nin-cifar10-cpu --data DIR --output runs/nin
    torchrun --nproc_per_node 2 -m training pretrain RECIPE ...

DIR is the folder of the recipe's dataset, for example CIFAR-10 as train/<class>/*.png; --download downloads it.
--dataset selects another one: a folder of images, or a dataset of timm. A GPU is used if there is one; several
processes share the images of a step. TensorBoard shows the curve during the training: tensorboard --logdir OUTPUT.

`rotation-ssl pretrain --help` describes how images are read, what the output folder gets, and how to stop and continue.
"""

import dataclasses
from pathlib import Path

import torch

from rotation_ssl.pretraining.command import execute
from rotation_ssl.pretraining.images import UnlabelledImages
from rotation_ssl.pretraining.loop import pretrain
from rotation_ssl.pretraining.options import add_options
from rotation_ssl.pretraining.recipe import Recipe
from rotation_ssl.pretraining.setup import create_accelerator
from rotation_ssl.pretraining.state import find_checkpoint
from training.command import CIFAR10_DIR, create_parser
from training.datasets import open_unlabelled
from training.recipes import RECIPES
from training.reporting.rows import current_commit


def finished_run(
    recipe: Recipe, images: torch.Tensor | UnlabelledImages, output: Path, device: str = "cpu", workers: int = 0
) -> Path:
    """The weights of a run: those that are there, or made by beginning it or going on with it.

    ``workers`` processes decode the images that are not in memory.

    Raises:
        KeyboardInterrupt: the run was stopped; its checkpoint is kept.
    """
    weights = output / "model.safetensors"
    begun = weights.exists() or find_checkpoint(output) is not None
    accelerator = create_accelerator(recipe, cpu=device == "cpu")
    if pretrain(recipe, images, output, accelerator, begun, workers=workers, commit=current_commit()) != weights:
        raise KeyboardInterrupt
    return weights


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    recipes = (
        f"{r.name:24s} {r.model}, {r.rotated_images:,} rotated images of {r.data}{'; ' + r.note if r.note else ''}"
        for r in RECIPES.values()
    )
    parser = create_parser("pretrain", __doc__, recipes)
    parser.add_argument("recipe", choices=sorted(RECIPES), metavar="RECIPE", help="one of the recipes below")
    add_options(parser, "runs/RECIPE", CIFAR10_DIR)
    parser.add_argument(
        "--dataset",
        help="dataset in --data: cifar10, tinyimagenet, photos, photo-views, folder, or a name of timm "
        "(torch/..., hfds/...)",
    )
    args = parser.parse_args(arguments)
    recipe = RECIPES[args.recipe]
    recipe = dataclasses.replace(recipe, data=args.dataset or recipe.data)
    root, download, workers = args.data, args.download, args.workers
    return execute(
        args, recipe, lambda r: open_unlabelled(r.data, root, r.image_size, download, workers), current_commit()
    )
