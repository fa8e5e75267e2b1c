"""Crops are windows of the image, drawn alike for all of it or for a part; mirroring is left to right alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms.v2.functional import resized_crop

from rotation_ssl.pretraining.augment import (
    Boxes,
    crop_and_flip,
    draw_boxes,
    draw_windows,
    take_boxes,
    take_windows,
    whole_boxes,
)


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
    parts = [
        take_windows(images[p], windows._make(values[p] for values in windows), 6, "reflect")
        for p in (slice(0, 2), slice(2, 6))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(crop_and_flip(images, 6, 2, "reflect", True, generator()), whole)


def test_which_are_mirrored_can_be_told():
    images = coordinates(8).expand(4, 2, 8, 8)
    told = torch.tensor([True, False, False, True])
    assert torch.equal(crop_and_flip(images, 8, 0, "reflect", told, generator())[:, 1, 0, 0] == 7, told)


@given(st.integers(1, 20), st.floats(0.05, 1.0), st.floats(0.0, 1.0), st.integers(0, 99))
def test_boxes_lie_in_the_image_and_have_the_scale(count, least, more, seed):
    most = least + (1 - least) * more
    boxes = draw_boxes(count, (least, most), True, generator(seed))
    for start, length in ((boxes.top, boxes.height), (boxes.left, boxes.width)):
        assert (start >= 0).all() and (length > 0).all() and (start + length <= 1 + 1e-6).all()
    area, aspect = boxes.height * boxes.width, boxes.width / boxes.height
    assert (area <= most + 1e-5).all() and (aspect < 4 / 3 + 1e-5).all() and (aspect > 3 / 4 - 1e-5).all()
    whole = (boxes.height < 1) & (boxes.width < 1)
    assert (area[whole] >= least - 1e-5).all(), "only a side that was cut makes a box smaller"
    again = draw_boxes(count, (least, most), True, generator(seed))
    assert all(torch.equal(getattr(again, name), getattr(boxes, name)) for name in boxes._fields)


def test_boxes_are_of_every_size_aspect_and_place():
    boxes = draw_boxes(4000, (0.2, 0.8), True, generator())
    assert 0.45 < boxes.mirrored.float().mean() < 0.55
    uncut = (boxes.height < 1) & (boxes.width < 1)
    assert uncut.float().mean() > 0.9
    area, aspect = (boxes.height * boxes.width)[uncut], (boxes.width / boxes.height)[uncut].log()
    assert area.mean() == pytest.approx(0.5, abs=0.02) and area.min() < 0.25 and area.max() > 0.75
    assert aspect.mean() == pytest.approx(0, abs=0.02)
    assert aspect.min() < -0.95 * math.log(4 / 3) and aspect.max() > 0.95 * math.log(4 / 3)
    places = torch.stack([boxes.top / (1 - boxes.height), boxes.left / (1 - boxes.width)])[:, uncut]
    for place in places:
        assert place.mean() == pytest.approx(0.5, abs=0.02) and place.std() == pytest.approx(12**-0.5, abs=0.01)
    drawn = torch.stack([area, aspect, *places, boxes.mirrored[uncut].float()])
    assert (torch.corrcoef(drawn) - torch.eye(5)).abs().max() < 0.08, "each is drawn by itself"


def test_the_whole_box_is_the_image_resized():
    images = torch.rand(2, 3, 8, 8, generator=generator())
    assert torch.allclose(take_boxes(images, whole_boxes(2), 8), images, atol=1e-6)
    mirrored = Boxes(
        *(getattr(whole_boxes(2), n) for n in ("top", "left", "height", "width")), torch.tensor([True, False])
    )
    torch.testing.assert_close(take_boxes(images, mirrored, 8)[0], images[0].flip(-1))
    torch.testing.assert_close(take_boxes(images, mirrored, 8)[1], images[1])
    larger = F.interpolate(images, size=12, mode="bilinear", align_corners=False)
    torch.testing.assert_close(take_boxes(images, whole_boxes(2), 12), larger)
    assert take_boxes(images, whole_boxes(2), 12).is_contiguous(memory_format=torch.channels_last)


def test_boxes_are_torchvisions_resized_crops():
    """But at the box's border, where torchvision repeats its pixels and we take the image's own."""
    image = torch.rand(1, 3, 16, 16, generator=generator())
    box = Boxes(*(torch.tensor([x / 16]) for x in (3.0, 5.0, 8.0, 4.0)), torch.tensor([False]))
    theirs = resized_crop(image, 3, 5, 8, 4, [12, 12], antialias=False)
    torch.testing.assert_close(take_boxes(image, box, 12)[..., 1:-1, 2:-2], theirs[..., 1:-1, 2:-2])


def test_each_box_is_taken_from_its_own_image():
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 3, 8, 8).to(torch.uint8)
    boxes = draw_boxes(5, (0.2, 0.8), True, generator())
    assert take_boxes(images, boxes, 6)[:, 0, 0, 0].tolist() == pytest.approx([0, 1, 2, 3, 4], abs=1e-4)
    part = boxes._make(values[1:3] for values in boxes)
    torch.testing.assert_close(take_boxes(images[1:3], part, 6), take_boxes(images, boxes, 6)[1:3])
