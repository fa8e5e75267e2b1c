"""Pretraining by predicting rotations: recipes, images and the loop, which needs the extra `train`."""

from pathlib import Path
from typing import Any

import torch


def pretrain(data: str | Path | torch.Tensor, output: str | Path, model: str | None = None, **options: Any) -> Path:
    """Pretrain a backbone on images of one's own, by predicting which way each was rotated.

    A script calls it below ``if __name__ == "__main__":``: processes that decode may import the script.

    Args:
        data: folder of images, searched in all depths, or its subfolder ``train`` alone if there is one; tar shards,
            ``"{000..999}.tar"``; or images (N, 3, H, H) uint8.
        output: folder that the weights go to, with their curve; ``timm.create_model("local-dir:OUTPUT",
            pretrained=True)`` takes it.
        model: any model of timm whose head can be resized; None: the recipe's, without one resnet18.
        **options: those of :func:`rotation_ssl.pretraining.command.run`: ``resume=True``; ``device="cpu"``;
            ``workers=8``; ``monitor=FOLDER, monitor_every=500``. Fields of the recipe by their names
            (:class:`rotation_ssl.pretraining.recipe.Recipe`): ``steps=2000``, ``image_size=64``,
            ``images_per_step=32``, ``precision="fp32"``, ``seed=1``, ``pretrained=True``; or ``recipe``, a whole one.

    Returns:
        The weights file; the checkpoint where Ctrl-C, heard in the main thread, stopped the run, from which
        ``resume=True`` goes on.

    Raises:
        ImportError: the extra is not installed.
        TypeError: an option that does not exist.
        ValueError: images, model, recipe and output do not fit, or the loss became infinite.
    """
    return engine().pretrain_model(data, Path(output), model, **options)


def engine() -> Any:
    """:mod:`rotation_ssl.pretraining.command`, imported when something is trained.

    Raises:
        ImportError: the extra is not installed; the error says how to.
    """
    try:
        from rotation_ssl.pretraining import command
    except ImportError as error:
        name = (error.name or str(error)).partition(".")[0]
        raise ImportError(f"pretraining needs {name}: pip install 'rotation-ssl[train]'") from error
    return command
