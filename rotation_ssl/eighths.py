"""The pretext task with eight rotations, the multiples of 45 degrees: row "8" of the paper's table 2.

View r is r x 45 degrees counter-clockwise. A batch of views is rotation-major: with N images, row r * N + i is image i
rotated by r x 45 degrees, and its label is r.

Rotations by 90 degrees only move pixels. The other four must interpolate, and the blur of that, or the empty corners,
would give the rotation away. Bilinear resampling of every view does not prevent this, because its blur depends on the
angle between the two grids. Therefore every view, including the multiples of 90 degrees, is resampled from the image's
inscribed circle with a round kernel: the weight of a pixel depends only on its distance from the sampled point. The
kernel keeps the frequencies below CUTOFF, which the pixels of any rotated grid can represent, so that every view loses
the same.

Sources: Gidaris et al. 2018, table 2 (https://arxiv.org/abs/1803.07728), whose views may have been made otherwise; the
kernel is Lanczos' windowed sinc in its polar form, Heckbert 1989, "Fundamentals of Texture Mapping and Image
Warping".
"""

import math
from functools import lru_cache

import torch

from rotation_ssl.rotations import check_square, concatenate_views

CUTOFF = 0.36  # cycles a pixel; the pixels' own limit is 0.5, and at 0.42 white noise is 5 % sharper upright than at 45
REACH = 3.0  # radius of the kernel in pixels
FIRST_ZERO = 1.2196698912665045  # of J1(pi x) / x: where the window ends
LARGEST = 64  # pixels: the weights of a view are a matrix of H^4 values, 64 MiB here


def rotate_eighths(images: torch.Tensor) -> torch.Tensor:
    """Rotate every image by the eight multiples of 45 degrees; view r + 2 is exactly view r rotated by 90 degrees.

    Args:
        images: (N, C, H, H), floating point, any device, H at most 64, normalised: outside of the inscribed circle the
            views are 0, which is the mean colour only after normalisation. A channels_last batch stays channels_last.

    Returns:
        (8 * N, C, H, H), rotation-major, same dtype, device and memory format.

    Raises:
        ValueError: images are not a batch of square floating-point images of at most 64 x 64 pixels.
    """
    check_square(images)
    size = images.shape[-1]
    if size > LARGEST:
        raise ValueError(f"images must have at most {LARGEST} x {LARGEST} pixels, got {size} x {size}: resize them")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point, got {images.dtype}: normalise them before rotating")
    precision = torch.promote_types(images.dtype, torch.float32)
    pixels = images.to(precision).flatten(2)
    # autocast would round the kernel's weights to 8 bits
    with torch.autocast(images.device.type, enabled=False):
        upright, diagonal = (
            (pixels @ _view_weights(size, degrees, precision, images.device).T).view(images.shape)
            for degrees in (0, 45)
        )
    views = [torch.rot90(view, k, (-2, -1)) for k in range(4) for view in (upright, diagonal)]
    return concatenate_views(images, views).to(images.dtype)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # whoever asks first, the weights serve under autograd too
def _view_weights(size: int, degrees: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Weights (pixel of the view, pixel of the image) of the rotation; rows sum to 1 in the circle, are 0 outside."""
    doubled = 2 * torch.arange(size) + 1 - size  # pixel centres from the image's middle, in half pixels
    in_circle = (doubled[:, None] ** 2 + doubled**2 <= size**2).flatten()
    y, x = (part.flatten().double() / 2 for part in torch.meshgrid(doubled, doubled, indexing="ij"))
    # rows count downwards: on the screen this is where a counter-clockwise rotation takes each pixel from
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    from_x, from_y = x * cos - y * sin, x * sin + y * cos
    weights = _kernel(torch.hypot(from_x[:, None] - x, from_y[:, None] - y)) * in_circle
    weights = weights / weights.sum(1, keepdim=True)
    return torch.where(in_circle[:, None], weights, 0.0).to(dtype).to(device)


def _kernel(distance: torch.Tensor) -> torch.Tensor:
    window = torch.where(distance < REACH, _jinc(distance * FIRST_ZERO / REACH), 0.0)
    return _jinc(2 * CUTOFF * distance) * window


def _jinc(x: torch.Tensor) -> torch.Tensor:
    """2 J1(pi x) / (pi x), the round counterpart of the sinc; 1 at 0."""
    x = math.pi * x.clamp(min=1e-9)
    return 2 * torch.special.bessel_j1(x) / x
