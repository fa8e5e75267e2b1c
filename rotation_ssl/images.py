"""Image files -> batches that a backbone takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def read_image(file: Path | IO[bytes] | Image.Image) -> Image.Image:
    """One image as RGB, whatever its mode, upright as its EXIF orientation says.

    Args:
        file: a path, an open file, or an image that was opened already.

    Raises:
        ValueError: it does not exist, or does not decode; the error names the file.
    """
    try:
        with file if isinstance(file, Image.Image) else Image.open(file) as image:
            image.load()
            image.getexif()
            # what turns the image has read its orientation; it would write the other tags anew, and fail at a wrong one
            image.info.pop("exif", None)
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise ValueError(f"image {file} does not exist") from error
    except Exception as error:
        # what Pillow's many readers raise on damaged files is not one family
        raise ValueError(f"image {file} does not decode ({error}); replace or remove it") from error


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, sorted by path; those whose name begins with a dot are passed over.

    Raises:
        ValueError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise ValueError(f"image folder {folder} does not exist")
    found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith("."))
    if not found:
        raise ValueError(f"image folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return found


def read_images(files: Sequence[Path], size: int) -> torch.Tensor:
    """Decode files: (N, 3, size, size) uint8 in the order of ``files``; many of them with a progress bar."""
    images = np.empty((len(files), size, size, 3), dtype=np.uint8)
    for i, file in enumerate(
        tqdm(files, desc="reading images", unit="image", disable=len(files) < 5000, mininterval=0.5)
    ):
        images[i] = np.asarray(square(read_image(file), size))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 (N, C, H, W) in 0..255 -> float32 of the given mean and deviation (both of values in 0..1, by channel)."""
    scale = torch.tensor(std, device=images.device).mul(255).view(1, -1, 1, 1)
    shift = torch.tensor(mean, device=images.device).mul(255).view(1, -1, 1, 1)
    return (images.float() - shift) / scale


def square(image: Image.Image, size: int) -> Image.Image:
    """The image's centre square: its shorter side resized (bicubic) to ``size`` pixels, an image of that size as is."""
    if image.size == (size, size):
        return image
    width, height = image.size
    scale = size / min(width, height)
    resized = image.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        # what is transparent has no colour worth learning: show it on white, as viewers do
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")
