import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rotation_ssl.images import normalize, read_image
from training.data import CIFAR10_CLASSES, crop_and_flip, load_cifar10, load_folder


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


def test_normalize_by_hand():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    assert normalize(images, (0.5, 0.25), (0.5, 0.25)).flatten().tolist() == [-1.0, 3.0]


def test_small_folder(small_cifar10):
    data = load_cifar10(small_cifar10, "train")
    assert data.images.shape == (40, 3, 32, 32) and data.images.dtype == torch.uint8
    assert data.classes == CIFAR10_CLASSES and torch.bincount(data.labels).tolist() == [4] * 10
    first = min(small_cifar10.glob("train/*/*.png"), key=lambda file: file.name)
    assert np.array_equal(data.images[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(first)))
    assert data.classes[data.labels[0]] == first.parent.name


def test_whole_cifar10_is_the_original(whole_cifar10):
    digests = {
        "train": ("47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a", 50_000),
        "test": ("f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04", 10_000),
    }
    for split, (digest, count) in digests.items():
        data = load_cifar10(whole_cifar10, split)
        pixels = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        assert len(data) == count and hashlib.sha256(pixels.tobytes()).hexdigest() == digest


def gradient():
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    return Image.fromarray(np.broadcast_to(ramp, (32, 32)).copy())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK", "1"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_modes_become_rgb(tmp_path, mode, suffix):
    if mode == "CMYK" and suffix == "png":
        suffix = "jpg"
    if mode == "LA" and suffix == "tif":
        suffix = "png"
    file = tmp_path / f"image.{suffix}"
    palette = Image.Palette.ADAPTIVE if mode == "P" else Image.Palette.WEB
    gradient().convert("RGB").convert(mode, palette=palette).save(file)
    image = read_image(file)
    assert image.mode == "RGB" and image.size == (32, 32)
    if mode != "1":
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(gradient().convert("RGB")).astype(int))
        assert difference.mean() < 8


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")).min() == 255


def test_other_sizes_are_resized_and_cropped(tmp_path):
    (tmp_path / "a").mkdir()
    wide = np.zeros((40, 80, 3), dtype=np.uint8)
    wide[:, 20:60] = 200
    Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
    data = load_folder(tmp_path, 20)
    assert data.images.shape == (1, 3, 20, 20) and data.images[0, :, :, 3:-3].min() == 200


def test_missing_and_empty_folders(tmp_path, small_cifar10):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load_folder(tmp_path / "nowhere", 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no class folders"):
        load_folder(tmp_path / "empty", 32)
    with pytest.raises(ValueError, match=r"no CIFAR-10 in .*empty.*--download"):
        load_cifar10(tmp_path / "empty", "train")
    for file in (small_cifar10 / "train" / "frog").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"class folder .*frog holds no images"):
        load_cifar10(small_cifar10, "train")
    (small_cifar10 / "train" / "frog").rmdir()
    with pytest.raises(ValueError, match="is not CIFAR-10: its classes are"):
        load_cifar10(small_cifar10, "train")


def test_damaged_batches_are_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match=r"cannot be had .*--download"):
        load_cifar10(tmp_path, "train")


def test_images_that_do_not_decode_are_named(small_cifar10):
    file = next((small_cifar10 / "train" / "cat").iterdir())
    whole = file.read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file.name} does not decode"):
            load_cifar10(small_cifar10, "train")
