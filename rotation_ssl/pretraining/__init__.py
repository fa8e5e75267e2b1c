"""Pretraining by predicting rotations: recipes, images and the loop, which needs the extra `train`."""

from pathlib import Path
from typing import Any

import torch


def pretrain(data: str | Path | torch.Tensor, output: str | Path, model: str | None = None, **options: Any) -> Path:
    """Pretrain a backbone on your own images by predicting image rotations.

    In a script, call it below ``if __name__ == "__main__":``, because data-loading workers may import the script.

    Args:
        data: folder of images, searched recursively (only its subfolder ``train``, if there is one); tar shards,
            ``"{000..999}.tar"``; or images (N, 3, H, H) uint8.
        output: folder for weights, run.json and curve; ``timm.create_model("local-dir:OUTPUT", pretrained=True)``
            loads the weights.
        model: any timm model whose head can be resized; None: the recipe's, by default resnet18.
        **options: those of :func:`rotation_ssl.pretraining.command.run`: ``resume=True``; ``device="cpu"``;
            ``workers=8``; ``monitor=FOLDER, monitor_every=500``. Fields of the recipe by their names
            (:class:`rotation_ssl.pretraining.recipe.Recipe`): ``steps=2000``, ``image_size=64``,
            ``images_per_step=32``, ``precision="fp32"``, ``seed=1``, ``pretrained=True``; or ``recipe``, a whole one.

    Returns:
        The weights file, or, if Ctrl-C stopped the run, the checkpoint from which ``resume=True`` continues. Ctrl-C is
        handled in the main thread only.

    Raises:
        ImportError: the extra `train` is not installed.
        TypeError: an option that does not exist.
        ValueError: images, model, recipe and output do not fit together, or a loss is not finite.
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
