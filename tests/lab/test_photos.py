"""The dataset photos: what it is made of, what is left out of it, and that nothing else is taken for it."""

import json

import numpy as np
import pytest
import torch
from conftest import SAMPLES
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from rotation_ssl.images import find_images, read_image
from training import photos
from training.__main__ import main
from training.datasets import open_unlabelled


def texture(seed, width=240, height=200):
    """A smooth picture of its own for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save(image, *parts, **options):
    file = parts[0].joinpath(*parts[1:])
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)


@pytest.fixture
def sources(tmp_path):
    """The five datasets in their layout, with a few pictures each; two training images are held-out ones again."""
    root = tmp_path / "sets"
    for i, name in enumerate(("imagenette2-320", "imagewoof2-320")):
        save(texture(10 * i), root, name, "train", "n01", "a.JPEG")
        save(texture(10 * i + 1), root, name, "train", "n02", "b.JPEG")
        save(texture(10 * i + 2), root, name, "val", "n01", "c.JPEG")
    save(texture(30, 128, 128), root, "miniplaces", "data", "images", "train", "a", "abbey", "1.jpg")
    save(texture(31, 128, 128), root, "miniplaces", "data", "images", "val", "1.jpg")
    # caltech101: one of the training images is the mirror image of imagenette's held-out one, smaller
    save(ImageOps.mirror(texture(2)).resize((150, 125)), root, "caltech101", "101_ObjectCategories", "x", "1.jpg")
    save(texture(41), root, "caltech101", "101_ObjectCategories", "x", "2.jpg")
    save(texture(42), root, "caltech101", "101_ObjectCategories", "x", "3.jpg")
    (root / "caltech101" / "train.txt").write_text("x/1.jpg\nx/2.jpg\n")
    (root / "caltech101" / "test.txt").write_text("x/3.jpg\n")
    # VOC2007: an image of imagewoof's training set, compressed harder
    save(texture(11), root, "VOCdevkit", "VOC2007", "JPEGImages", "000001.jpg", quality=30)
    return root


def test_what_is_like_a_held_out_image_is_left_out(sources, tmp_path, capsys):
    output = tmp_path / "photos"
    assert main(["photos", "--data", str(sources), "--output", str(output), "--workers", "1"]) == 0
    assert "wrote 5 images to" in capsys.readouterr().out
    listing = json.loads((output / "photos.json").read_text())
    assert {(pair["image"], pair["like"]) for pair in listing["left_out"]} == {
        ("caltech101/101_ObjectCategories/x/1.jpg", "imagenette2-320/val/n01/c.JPEG"),
        ("imagewoof2-320/train/n02/b.JPEG", "VOCdevkit/VOC2007/JPEGImages/000001.jpg"),
    }
    assert all(pair["bits"] <= photos.NEAR for pair in listing["left_out"])
    written = find_images(output / "train")
    assert [str(file.relative_to(output / "train")) for file in written] == [
        "caltech101/101_ObjectCategories/x/2.jpg",
        "imagenette2-320/train/n01/a.jpg",
        "imagenette2-320/train/n02/b.jpg",
        "imagewoof2-320/train/n01/a.jpg",
        "miniplaces/data/images/train/a/abbey/1.jpg",
    ]
    assert listing["sha256_of_names"] == photos.sha256_of_names(output / "train", written)
    assert [read_image(file).size for file in written] == [(192, 192)] * 4 + [(128, 128)]
    # nothing is overwritten
    assert main(["photos", "--data", str(sources), "--output", str(output)]) == 2
    assert "already contains the set" in capsys.readouterr().err


def test_the_set_is_the_whole_of_it(sources, tmp_path, monkeypatch):
    output = tmp_path / "photos"
    photos.prepare(sources, output, 1)
    with pytest.raises(ValueError, match="is not the whole of photos: 5 images of 114,334"):
        open_unlabelled("photos", output, 64)
    with pytest.raises(ValueError, match="write them with python -m training photos"):
        open_unlabelled("photos", sources, 64)
    digest = photos.sha256_of_names(output / "train", find_images(output / "train"))
    monkeypatch.setattr(photos, "SHA256_OF_NAMES", digest)
    assert len(open_unlabelled("photos", output, 64)) == 5


def test_photo_views_are_squares_and_whole_photographs(sources, monkeypatch):
    output = sources / "photos"
    photos.prepare(sources, output, 1)
    monkeypatch.setattr(
        photos, "SHA256_OF_NAMES", photos.sha256_of_names(output / "train", find_images(output / "train"))
    )
    views = open_unlabelled("photo-views", sources, 96)
    squares = open_unlabelled("photos", output, 96)
    assert len(views) == 4 * 4 + 1
    for i in range(4):
        square, whole, *again = (views[4 * i + j][0] for j in range(4))
        assert torch.equal(square, squares[i][0]) and not torch.equal(square, whole)
        assert torch.equal(again[0], square) and torch.equal(again[1], whole)
    # that of Caltech-101: the whole width is in it
    photograph = read_image(sources / "caltech101" / "101_ObjectCategories" / "x" / "2.jpg")
    expected = np.asarray(photograph.resize((96, 96), Image.Resampling.BICUBIC))
    assert np.array_equal(views[1][0].permute(1, 2, 0), expected)
    assert torch.equal(views[16][0], squares[4][0])
    (sources / "imagewoof2-320" / "train" / "n01" / "a.JPEG").unlink()
    with pytest.raises(ValueError, match=r"train/n01/a is missing, of which .* has the square: fetch imagewoof2-320"):
        open_unlabelled("photo-views", sources, 96)
    with pytest.raises(ValueError, match="lacks imagenette2-320"):
        open_unlabelled("photo-views", output, 96)


def test_sources_that_lack_parts_are_named(sources, tmp_path, capsys):
    (sources / "caltech101" / "test.txt").unlink()
    arguments = ["photos", "--data", str(sources), "--output", str(tmp_path / "new")]
    assert main(arguments) == 2
    assert "caltech101/test.txt, the list of its images, cannot be read" in capsys.readouterr().err
    (sources / "imagewoof2-320").rename(tmp_path / "elsewhere")
    assert main(arguments) == 2
    assert f"{sources} lacks imagewoof2-320" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_image_that_does_not_decode_is_named(sources, tmp_path, capsys):
    (sources / "imagenette2-320" / "train" / "n01" / "a.JPEG").write_bytes(b"no image")
    assert main(["photos", "--data", str(sources), "--output", str(tmp_path / "new"), "--workers", "1"]) == 2
    assert "n01/a.JPEG does not decode" in capsys.readouterr().err
    assert not (tmp_path / "new" / "photos.json").exists()


def test_the_hash_is_of_what_is_seen(tmp_path):
    files = sorted((SAMPLES / "photos").glob("*.jpg"))
    for file in files:
        image = Image.open(file).convert("RGB")
        image.resize((160, 120)).save(tmp_path / "small.jpg", quality=60)
        assert (photos.difference_hash(file) != photos.difference_hash(tmp_path / "small.jpg")).sum() <= photos.NEAR
    hashes = torch.from_numpy(np.stack([photos.difference_hash(file) for file in files]))
    bits, which = photos.nearest(hashes, hashes)
    assert bits.tolist() == [0] * len(files) and which.tolist() == list(range(len(files)))
    apart = (hashes[:, None] != hashes).sum(2) + 256 * torch.eye(len(files), dtype=torch.long)
    assert apart.min() > 2 * photos.NEAR


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**31))
def test_the_nearest_hash_differs_in_the_fewest_bits(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    own, others = (torch.rand(count, 256, generator=generator) < 0.5 for count in (n, m))
    bits, which = photos.nearest(own, others, part=2)
    distances = (own[:, None] != others).sum(2)
    assert torch.equal(bits, distances.min(1).values)
    assert torch.equal(distances.gather(1, which[:, None])[:, 0], bits)
