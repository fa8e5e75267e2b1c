"""Image files as squares: how much of them is decoded and resized."""

import numpy as np
import pytest
from PIL import Image

from rotation_ssl.images import read_image, square


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(90, 30), (20, 160), (33, 17), (16, 16)])
def test_the_whole_image_is_resized(size):
    image = noise(*size)
    scale = 16 / min(size)
    resized = image.resize([round(side * scale) for side in size], Image.Resampling.BICUBIC)
    left, top = ((side - 16) // 2 for side in resized.size)
    assert square(image, 16).tobytes() == resized.crop((left, top, left + 16, top + 16)).tobytes()


def test_of_very_long_images_the_middle_is_resized(tmp_path):
    """All of it, 128 pixels high, would take 147 GB."""
    noise(3_000_000, 1).save(tmp_path / "long.png")
    image = read_image(tmp_path / "long.png")
    middle = image.crop((1_499_996, 0, 1_500_004, 1))
    assert square(image, 128).tobytes() == square(middle, 128).tobytes()
    upright = image.transpose(Image.Transpose.ROTATE_90)
    middle = middle.transpose(Image.Transpose.ROTATE_90)
    assert square(upright, 128).tobytes() == square(middle, 128).tobytes()
