"""Crops are windows of the image, drawn alike for all of it or for a part; mirroring is left to right alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.augment import crop_and_flip, draw_windows, take_windows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates(size):
    """An image whose pixels are their own rows and columns."""
    return torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))[None]


@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 3), st.integers(0, 99))
def test_crops_are_windows_of_the_image(size, crop, padding, seed):
    padding = min(padding, size - 1)
    crop = min(crop, size + 2 * padding)
    out = crop_and_flip(coordinates(size), crop, padding, "reflect", False, generator(seed))
    assert out.shape == (1, 2, crop, crop)
    rows, cols = out[0, 0, :, 0], out[0, 1, 0, :]
    assert torch.equal(out[0, 0], rows[:, None].expand(crop, crop))
    assert torch.equal(out[0, 1], cols[None, :].expand(crop, crop))
    for line in (rows, cols):
        assert line.min() >= 0 and line.max() < size
        assert (line.diff().abs() == 1).all(), "neighbours stay neighbours, also where the padding mirrors"


def test_reflection_by_hand():
    image = torch.arange(4).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    padded = {
        tuple(crop_and_flip(image, 8, 2, "reflect", False, generator())[0, 0, 0].tolist()),
    }
    assert padded == {(2, 1, 0, 1, 2, 3, 2, 1)}
    assert crop_and_flip(image, 8, 2, "constant", False, generator())[0, 0, 3].tolist() == [0, 0, 0, 1, 2, 3, 0, 0]
    assert crop_and_flip(image + 1, 8, 2, "constant", False, generator())[0, 0, 0].tolist() == [0] * 8


def test_half_of_the_crops_are_mirrored_and_only_left_to_right():
    images = coordinates(8).expand(2000, 2, 8, 8)
    out = crop_and_flip(images, 8, 0, "reflect", True, generator())
    mirrored = out[:, 1, 0, 0] == 7
    assert 0.45 < mirrored.float().mean() < 0.55
    assert torch.equal(out[mirrored], images[mirrored].flip(-1))
    assert torch.equal(out[~mirrored], images[~mirrored])


def test_every_offset_occurs_alike():
    out = crop_and_flip(coordinates(8).expand(3000, 2, 8, 8), 6, 0, "reflect", False, generator())
    counts = torch.bincount(out[:, 0, 0, 0], minlength=3)
    assert len(counts) == 3 and counts.min() > 900


def test_crop_is_channels_last_and_keeps_the_dtype():
    out = crop_and_flip(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), 24, 4, "reflect", True, generator())
    assert out.dtype == torch.uint8 and out.is_contiguous(memory_format=torch.channels_last)


def test_bad_crops():
    with pytest.raises(ValueError, match="crop 41 does not fit"):
        crop_and_flip(torch.zeros(1, 3, 32, 32), 41, 4, "reflect", True, generator())
    with pytest.raises(ValueError, match="'edge'"):
        crop_and_flip(torch.zeros(1, 3, 32, 32), 32, 4, "edge", True, generator())


def test_parts_of_a_batch_are_cropped_as_the_whole():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    windows = draw_windows(6, 8, 6, 2, True, generator())
    whole = take_windows(images, windows, 6, "reflect")
    parts = [take_windows(images[p], windows.part(p), 6, "reflect") for p in (slice(0, 2), slice(2, 6))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(crop_and_flip(images, 6, 2, "reflect", True, generator()), whole)


def test_which_are_mirrored_can_be_told():
    images = coordinates(8).expand(4, 2, 8, 8)
    told = torch.tensor([True, False, False, True])
    assert torch.equal(crop_and_flip(images, 8, 0, "reflect", told, generator())[:, 1, 0, 0] == 7, told)
