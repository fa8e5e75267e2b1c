"""Image files as squares: how much of them is decoded and resized."""

import numpy as np
import pytest
import timm
import torch
from conftest import SAMPLES
from PIL import Image

from rotation_ssl import cli
from rotation_ssl.embedding import embed, embed_images, load
from rotation_ssl.embedding.parts import read_manifest
from rotation_ssl.features import extract_features
from rotation_ssl.images import OVERSIZE, find_images, is_image_name, normalize, read_image, read_images, square

PHOTOS = find_images(SAMPLES / "photos")


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


@pytest.mark.parametrize(
    ("least", "expected"), [(0, 480), (64, 120), (60, 60), (61, 120), (150, 240), (241, 480), (900, 480)]
)
def test_large_jpegs_are_decoded_at_a_part_of_their_size(tmp_path, least, expected):
    noise(600, 480).save(tmp_path / "x.jpg")
    noise(600, 480).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.jpg", least).size == (600 * expected // 480, expected)
    assert read_image(tmp_path / "x.png", least).tobytes() == noise(600, 480).tobytes()
    if expected == 480:
        assert read_image(tmp_path / "x.jpg", least).tobytes() == read_image(tmp_path / "x.jpg").tobytes()


def test_every_suffix_of_jpeg_is_that_of_an_image():
    Image.init()
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form == "JPEG"}
    assert suffixes >= {".jfif", ".jpe"} and all(is_image_name(f"x{suffix.upper()}") for suffix in suffixes)


def test_images_of_too_many_pixels_are_told_so(tmp_path, monkeypatch):
    noise(1000, 2001).save(tmp_path / "x.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(
        ValueError, match=r"x\.jpg has more than 2 million pixels, which are not read; make it smaller$"
    ):
        read_image(tmp_path / "x.jpg", 64)


def test_commands_do_not_warn_of_large_photographs(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    noise(200, 150).save(tmp_path / "images" / "x.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.warns(Image.DecompressionBombWarning):
        read_image(tmp_path / "images" / "x.jpg")
    for arguments in (
        ["features", "-o", f"{tmp_path}/f.csv"],
        ["features", "-o", f"{tmp_path}/out/", "--workers", "0"],
        ["outliers", "-o", f"{tmp_path}/s.csv", "--sheet", f"{tmp_path}/s.png"],
    ):
        # a warning is an error here
        assert cli.main([*arguments, f"{tmp_path}/images", "--model", "rotnet_nin"]) == 0
    assert embed_images(tmp_path / "out", [tmp_path / "images" / "x.jpg"])["block2"].shape == (1, 192)


def features(pixels, model, layer):
    pixels = normalize(pixels, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    return extract_features(model, pixels, [layer])[layer]


def test_features_of_what_is_decoded_at_a_part_of_its_size(tmp_path):
    """Alike, of photographs at an eighth of their size; in parts, of queries and of a single file they are the same."""
    model = timm.create_model("rotnet_nin", pretrained=True)
    pixels = {least: read_images(PHOTOS, 32, least) for least in (0, OVERSIZE * 32)}
    whole, reduced = (features(part, model, "block2") for part in pixels.values())
    assert not torch.equal(*pixels.values())
    assert torch.cosine_similarity(whole, reduced).min() > 0.99
    embed(SAMPLES / "photos", tmp_path / "out", "rotnet_nin", workers=0, precision="fp32", format="npy")
    assert read_manifest(tmp_path / "out").decoded_side == 64
    (part,) = load(tmp_path / "out")
    torch.testing.assert_close(torch.tensor(part.features["block2"]), reduced, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embed_images(tmp_path / "out", PHOTOS)["block2"], reduced, rtol=1e-4, atol=1e-5)
    status = cli.main(["features", str(SAMPLES / "photos"), "-o", str(tmp_path / "f.npz"), "--model", "rotnet_nin"])
    with np.load(tmp_path / "f.npz") as file:
        torch.testing.assert_close(torch.from_numpy(file["block2"]), reduced, rtol=1e-4, atol=1e-5)
    assert status == 0
