"""Eight rotations: their laws and directions, and that neither blur nor corners tell which is which."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rotation_ssl.eighths import rotate_eighths
from rotation_ssl.rotations import count_correct, cross_entropy_of_rotations

SIZES = (8, 9, 24, 32)


def circle(size):
    """The pixels whose centres are in the inscribed circle."""
    centre = (size - 1) / 2
    y, x = torch.meshgrid(torch.arange(size) - centre, torch.arange(size) - centre, indexing="ij")
    return x.hypot(y) <= size / 2


def smooth(count, size):
    """Images without detail near the pixel: four times coarser noise, enlarged."""
    coarse = torch.randn(count, 3, size // 4, size // 4)
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False)


def spot(size, x, y, sigma=1.5):
    """A bright spot ``x`` pixels to the right and ``y`` upwards of the middle."""
    position = torch.arange(size) - (size - 1) / 2
    return torch.exp(-((position - x) ** 2 + (position[:, None] + y) ** 2) / (2 * sigma**2))


def sharpness(views):
    """Mean squared difference of neighbours, across plus down, where both are in the circle."""
    inside = circle(views.shape[-1])
    across = views.diff(dim=-1)[..., inside[:, 1:] & inside[:, :-1]]
    down = views.diff(dim=-2)[..., inside[1:] & inside[:-1]]
    return float(across.square().mean() + down.square().mean())


def bilinear(images, degrees):
    """The images turned once by torch's own resampling, as any program would."""
    cos, sin = torch.tensor(degrees).deg2rad().cos(), torch.tensor(degrees).deg2rad().sin()
    turn = torch.tensor([[cos, -sin, 0], [sin, cos, 0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


@pytest.mark.parametrize("size", SIZES)
def test_two_eighths_are_exactly_a_quarter_turn(size):
    views = rotate_eighths(torch.randn(2, 3, size, size)).view(8, 2, 3, size, size)
    for r in range(8):
        assert torch.equal(views[(r + 2) % 8], torch.rot90(views[r], 1, (-2, -1)))


def test_turning_the_image_shifts_the_views():
    images = torch.randn(2, 3, 24, 24)
    views = rotate_eighths(images).view(8, 2, 3, 24, 24)
    turned = rotate_eighths(torch.rot90(images, 1, (-2, -1))).view(8, 2, 3, 24, 24)
    torch.testing.assert_close(turned, views.roll(-2, 0), rtol=1e-5, atol=1e-5)


def test_turning_twice_is_turning_on():
    images = smooth(4, 32)
    once = rotate_eighths(images).view(8, 4, 3, 32, 32)
    inner = circle(32) & (spot(32, 0, 0, sigma=8) > spot(32, 0, 0, sigma=8)[15, 28])
    for r in (1, 3):
        twice = rotate_eighths(once[r]).view(8, 4, 3, 32, 32)[r]
        # the second turn blurs a little more, another view would be as far off as another image
        error = (twice - once[2 * r])[..., inner].square().mean() / once[2 * r][..., inner].square().mean()
        other = (twice - once[2 * r + 1])[..., inner].square().mean() / once[2 * r][..., inner].square().mean()
        assert error < 0.02 and other > 0.3


def test_rotation_major_order():
    images = torch.randn(3, 3, 16, 16)
    together = rotate_eighths(images)
    for i, image in enumerate(images):
        torch.testing.assert_close(together[i::3], rotate_eighths(image[None]), rtol=1e-5, atol=1e-6)


def test_upright_view_is_the_image_a_little_blurred():
    images = smooth(4, 32)
    upright = rotate_eighths(images)[:4]
    error = (upright - images)[..., circle(32)].square().mean() / images[..., circle(32)].square().mean()
    assert error < 0.01


def test_turns_are_counter_clockwise():
    """A spot at the right is at the top right after 45 degrees, at the top after 90, and so on round."""
    views = rotate_eighths(spot(33, 10, 0)[None, None])
    diagonal = 10 / 2**0.5
    places = [(10, 0), (diagonal, diagonal), (0, 10), (-diagonal, diagonal)]
    places += [(-x, -y) for x, y in places]
    for view, (x, y) in zip(views[:, 0], places, strict=True):
        column = (view.sum(0) * (torch.arange(33) - 16)).sum() / view.sum()
        row = (view.sum(1) * (16 - torch.arange(33))).sum() / view.sum()
        assert (column.item(), row.item()) == pytest.approx((x, y), abs=0.1)


@pytest.mark.parametrize("size", [1, 2, 3, *SIZES, 48])
def test_a_constant_image_is_the_disc_in_every_view(size):
    disc = circle(size).float()
    for view in rotate_eighths(torch.full((1, 2, size, size), 3.0)):
        torch.testing.assert_close(view, 3 * disc.expand(2, size, size), rtol=1e-4, atol=1e-4)


def test_corners_neither_tell_nor_are_seen():
    images = torch.randn(2, 3, 32, 32)
    views = rotate_eighths(images)
    assert not views[..., ~circle(32)].any()
    assert torch.equal(rotate_eighths(torch.where(circle(32), images, 100.0)), views)


@pytest.mark.parametrize("size", [24, 32])
def test_blur_does_not_tell_the_rotation(size):
    noise = torch.randn(400, 3, size, size)
    views = [sharpness(view) for view in rotate_eighths(noise).split(len(noise))]
    assert max(views) / min(views) < 1.02
    # what this would say of one resampling for odd eighths alone, and of two for every view
    assert sharpness(noise) / sharpness(bilinear(noise, 45.0)) > 2
    tilted = bilinear(noise, 22.5)
    assert sharpness(bilinear(tilted, -22.5)) / sharpness(bilinear(tilted, 22.5)) > 1.15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_and_memory_format_stay(dtype):
    images = torch.randn(2, 3, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    views = rotate_eighths(images)
    assert views.dtype == dtype and views.shape == (16, 3, 8, 8)
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert rotate_eighths(images.contiguous()).is_contiguous()


def test_autocast_does_not_round_the_views():
    images = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        views = rotate_eighths(images)
    assert torch.equal(views, rotate_eighths(images))


def test_an_empty_batch():
    assert rotate_eighths(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"batch \(N, C, H, W\).*images\[None\]"),
        (torch.zeros(1, 3, 8, 9), r"must be square, got \(8, 9\)"),
        (torch.zeros(1, 3, 65, 65), "at most 64 x 64 pixels, got 65 x 65"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "must be floating point, got torch.uint8"),
    ],
)
def test_errors(images, message):
    with pytest.raises(ValueError, match=message):
        rotate_eighths(images)


class Fixed(nn.Module):
    """Says view 5 of every image."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(F.one_hot(torch.tensor(5), 8).float())

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def test_loss_by_hand():
    model = Fixed()
    loss = cross_entropy_of_rotations(model(rotate_eighths(torch.randn(3, 3, 8, 8))), 8)
    # one view in eight is 5: log(7 + e) less an eighth of its logit
    assert loss.item() == pytest.approx(torch.tensor(7 + torch.e).log().item() - 1 / 8)
    loss.backward()
    assert model.logits.grad is not None


def test_loss_names_the_head_it_needs():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(ValueError, match=r"8 logits an image.*shape \(24, 4\): create it with num_classes=8"):
        cross_entropy_of_rotations(model(rotate_eighths(torch.randn(3, 3, 8, 8))), 8)


def test_counting_and_the_model_mode():
    model = nn.Sequential(nn.BatchNorm2d(3), Fixed()).train()
    model[0].eval()
    assert count_correct(model, [rotate_eighths(torch.randn(n, 3, 8, 8)) for n in (3, 2)], 8) == (5, 40)
    assert model.training and model[1].training and not model[0].training


def test_evaluation_first_leaves_training_possible():
    """What inference mode made first must serve under autograd: size 11 is this test's alone."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 11 * 11, 8))
    images = torch.randn(2, 3, 11, 11, requires_grad=True)
    count_correct(model, map(rotate_eighths, [images]), 8)
    cross_entropy_of_rotations(model(rotate_eighths(images)), 8).backward()
    assert images.grad is not None
