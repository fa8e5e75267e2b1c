"""Run the bundled rotnet_nin on images: by how much is each one rotated, and where does the network look?

    python -m rotation_ssl.demo [IMAGE ...] [-o FIGURE]

Without arguments it uses the package's sample images and first rotates the i-th one by i x 90 degrees, so that there is
something to predict. Your own images are used as they are. The figure needs matplotlib; the printed predictions do not.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torchvision.transforms.v2 import functional as TF

import rotation_ssl  # noqa: F401  registers the models with timm
from rotation_ssl.cli.options import check_output
from rotation_ssl.features import attention_map, extract_features
from rotation_ssl.images import normalize, read_image, square
from rotation_ssl.zoo.golden import SAMPLES_DIR

POWERS = {"block1": 1.0, "block2": 2.0, "block3": 4.0}


def to_batch(squares: list[torch.Tensor], model: nn.Module) -> torch.Tensor:
    """Square uint8 images of any size -> (N, 3, H, H), of the size and normalisation that the model takes."""
    cfg = resolve_model_data_config(model)
    size, bicubic = list(cfg["input_size"][-2:]), TF.InterpolationMode.BICUBIC
    small = torch.stack([TF.resize(given, size, bicubic, antialias=True) for given in squares])
    return normalize(small, cfg["mean"], cfg["std"])


def predict(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest rotation of each image, (N,) in 0..3 x 90 degrees counter-clockwise, and its probability (N,)."""
    model.eval()
    with torch.inference_mode():
        probability, rotation = model(batch).softmax(1).max(1)
    return rotation, probability


def draw(
    squares: list[torch.Tensor],
    rotations: torch.Tensor,
    probabilities: torch.Tensor,
    maps: dict[str, torch.Tensor],
    file: Path,
) -> None:
    """Draw each image as given, its attention maps, and it rotated back by the prediction; this needs matplotlib."""
    from matplotlib.figure import Figure

    columns = 3 if len(squares) > 15 else 1
    rows = -(-len(squares) // columns)
    pictures = 2 + len(maps)
    figure = Figure(figsize=(columns * (pictures * 0.95 + 0.3), rows * 1.12 + 0.15), layout="constrained")
    axes = np.atleast_2d(figure.subplots(rows, columns * pictures))
    for axis in axes.flat:
        axis.axis("off")
    for i, given in enumerate(squares):
        column, row = divmod(i, rows)
        line = axes[row, column * pictures : (column + 1) * pictures]
        upright = torch.rot90(given, -int(rotations[i]), (-2, -1))
        line[0].imshow(given.permute(1, 2, 0).numpy())
        for axis, attention in zip(line[1:-1], maps.values(), strict=True):
            axis.imshow(attention[i].numpy(), cmap="inferno", vmin=0, vmax=1)
        line[-1].imshow(upright.permute(1, 2, 0).numpy())
        line[-1].set_title(f"{90 * int(rotations[i])}°, {100 * probabilities[i]:.0f} %", fontsize=6, pad=2)
        if row == 0:
            for axis, title in zip(line, ("as given", *maps, "rotated back by"), strict=True):
                axis.set_title(f"{title}\n{axis.get_title()}".strip(), fontsize=6, pad=2)
    figure.savefig(file, dpi=130)


def show(files: list[Path], turns: list[int] | None, figure: Path) -> None:
    """Print the prediction for each image, and draw the figure where matplotlib is installed.

    Args:
        files: the images.
        turns: for each image, how many times it is first rotated by 90 degrees; None to use them as they are.
        figure: the file to write.

    Raises:
        ValueError: an image that cannot be read.
    """
    pictures = [read_image(file) for file in files]
    squares = [TF.pil_to_tensor(square(picture, min(picture.size))) for picture in pictures]
    squares = [torch.rot90(upright, k, (-2, -1)) for upright, k in zip(squares, turns or [0] * len(files), strict=True)]
    model = timm.create_model("rotnet_nin", pretrained=True)
    print(f"rotnet_nin.{model.pretrained_cfg['tag']}: {len(files)} image{'s' * (len(files) != 1)}")
    batch = to_batch(squares, model)
    rotations, probabilities = predict(model, batch)
    features = extract_features(model, batch, pool=None)
    shapes = "  ".join(f"{layer} {'x'.join(map(str, f.shape[1:]))}" for layer, f in features.items())
    for i, file in enumerate(files):
        truth = "" if turns is None else f"rotated {90 * turns[i]:3d}, "
        print(f"{file.name:28s} {truth}predicted {90 * int(rotations[i]):3d} ({100 * probabilities[i]:5.1f} %)")
    if turns is not None:
        right = int((rotations == torch.tensor(turns)).sum())
        print(f"{right} of {len(files)} predictions correct (chance is a quarter)")
    print(f"features of each image: {shapes}")
    if find_spec("matplotlib") is None:
        print("no figure: it needs matplotlib: pip install 'rotation-ssl[demo]'")
        return
    size = (batch.shape[-2], batch.shape[-1])
    maps = {layer: attention_map(features[layer], power, size) for layer, power in POWERS.items()}
    draw(squares, rotations, probabilities, maps, figure)
    print(f"figure written to {figure}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rotation_ssl.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files [the package's samples]")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo.png"), help="figure to write [%(default)s]")
    args = parser.parse_args(arguments)
    files = args.images or sorted(p for p in SAMPLES_DIR.rglob("*") if p.suffix in (".png", ".jpg"))
    try:
        check_output(args.output, files, force=True)
        show(files, None if args.images else [i % 4 for i in range(len(files))], args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
