import errno
import hashlib
import io
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rotation_ssl.embedding.files import list_folder
from rotation_ssl.images import count_suffixes, find_files, find_images, normalize, read_image
from rotation_ssl.labelled import load_folder
from rotation_ssl.pretraining.images import UnlabelledImages
from training import datasets
from training.datasets import CIFAR10_CLASSES, load_cifar10, load_images, open_unlabelled, tinyimagenet_files
from training.evaluation.labelled import open_labelled


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


@pytest.mark.slow
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


RAMP = np.array([[0, 127, 128, 257], [385, 386, 65407, 65535]], dtype=np.uint16)
# v / 257, rounded: 127 / 257 is under a half, 128 / 257 over it
EIGHT_BITS = [0, 0, 0, 1, 1, 2, 255, 255]


def png(values, colour, *chunks):
    """A PNG of 16 bits of values (H, W) or (H, W, C); Pillow writes only grey ones."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def pgm(values, largest):
    return b"P5 %d %d %d\n" % (*values.shape[::-1], largest) + values.astype(">u2").tobytes()


def tiff(values):
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF")
    return stream.getvalue()


def tiff12(values):
    """A TIFF of 12 bits a pixel, two of them in three bytes."""
    first, second = values.reshape(-1, 2).T.astype(np.uint16)
    data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries).ljust(122, b"\0") + data


SIXTEEN_BITS = {
    "grey.png": png(RAMP, 0),
    "little-endian.tif": tiff(RAMP),
    "big-endian.tif": tiff(RAMP.astype(">u2")),
    "grey.pgm": pgm(RAMP, 65535),
}


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_16_bits_are_scaled_to_8(tmp_path, name):
    (tmp_path / name).write_bytes(SIXTEEN_BITS[name])
    image = np.asarray(read_image(tmp_path / name))
    assert image.shape == (2, 4, 3) and (image == image[..., :1]).all()
    assert image[..., 0].ravel().tolist() == EIGHT_BITS


def test_16_bits_with_white_as_zero(tmp_path):
    image = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    image.save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.asarray(read_image(tmp_path / "a.tif"))[..., 0].tolist() == [[255, 0]]


def test_fewer_than_16_bits_in_a_16_bit_mode(tmp_path):
    values = np.array([[0, 8, 9, 2048], [4086, 4087, 4094, 4095]])
    (tmp_path / "a.tif").write_bytes(tiff12(values))
    (tmp_path / "a.pgm").write_bytes(pgm(values, 4095))
    expected = [0, 0, 1, 128, 254, 255, 255, 255]  # v / 16.06, rounded
    for name in ("a.tif", "a.pgm"):
        assert np.asarray(read_image(tmp_path / name))[..., 0].ravel().tolist() == expected


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bits_of_colour_or_alpha(tmp_path, colour, channels):
    """Pillow itself drops the lower byte of these."""
    values = np.repeat(RAMP[..., None], channels, axis=2)
    if channels in (2, 4):
        values[..., -1] = 65535
    (tmp_path / "a.png").write_bytes(png(values, colour))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 1], RAMP >> 8)


def test_the_transparent_grey_of_16_bits_is_white(tmp_path):
    (tmp_path / "a.png").write_bytes(png(RAMP, 0, (b"tRNS", struct.pack(">H", 257))))
    assert np.asarray(read_image(tmp_path / "a.png"))[..., 0].ravel().tolist() == [0, 0, 0, 255, 1, 2, 255, 255]


def test_pngs_of_16_bits_as_older_pillow_opens_them():
    image = Image.fromarray(RAMP.astype(np.int32))
    image.format = "PNG"
    assert image.mode == "I" and np.asarray(read_image(image))[..., 0].ravel().tolist() == EIGHT_BITS


@pytest.mark.parametrize(
    ("values", "mode"), [(RAMP.astype(np.int32), "I"), (RAMP.astype(np.float32), "F"), (np.eye(4, dtype="f4"), "F")]
)
def test_values_of_no_known_range_are_refused(tmp_path, values, mode):
    (tmp_path / "deep.tif").write_bytes(tiff(values))
    with pytest.raises(ValueError, match=rf"deep\.tif holds .*\(mode {mode}\), whose range is not known; convert it"):
        read_image(tmp_path / "deep.tif")


def test_only_regular_files_are_images(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "real.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("real.png")
    (tmp_path / "nowhere.png").symlink_to("gone.png")
    (tmp_path / ".hidden.png").touch()
    for name in ("b.gif", "a.GIF", "README"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    images, others = find_files(tmp_path)
    assert [file.name for file in images] == ["link.png", "nowhere.png", "real.png"] and find_images(tmp_path) == images
    assert count_suffixes(others) == "1 file without suffix, 2 .gif files, 1 .png file (not regular)"
    assert read_image(tmp_path / "link.png").size == (4, 4)
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(ValueError, match=rf"{name} does not decode \(it is not a regular file\)"):
            read_image(tmp_path / name)


def test_images_below_a_folder_are_sorted_by_path_and_links_to_folders_are_not_followed(tmp_path):
    names = ["a/z.png", "a-b/c.png", "a.png", "b/deep/d.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    for name in (".cache/e.png", "b/.Trash-1000/deep/f.png", "@eaDir/a.png/thumb.jpg", "b/__MACOSX/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    images, others = find_files(tmp_path)
    assert images == sorted(tmp_path / name for name in names) and not others


def fail_to_list(monkeypatch, unreadable, number):
    """Listing one folder fails; an administrator may list any."""
    listed = os.scandir

    def scandir(folder):
        if Path(folder) == unreadable:
            raise OSError(number, os.strerror(number), os.fspath(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_hidden_folders_are_not_even_listed(tmp_path, monkeypatch, number):
    (tmp_path / ".Trashes").mkdir()
    (tmp_path / "1.png").touch()
    fail_to_list(monkeypatch, tmp_path / ".Trashes", number)
    assert find_images(tmp_path) == [tmp_path / "1.png"] and list_folder(str(tmp_path)) == ["1.png"]
    for search in (lambda folder: find_images(Path(folder)), list_folder):
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            search(str(tmp_path / ".Trashes"))


def test_folders_of_the_system_are_skipped(tmp_path, monkeypatch):
    name = "lost+found"
    (tmp_path / name).mkdir()
    (tmp_path / "1.png").touch()
    fail_to_list(monkeypatch, tmp_path / name, errno.EACCES)
    assert find_images(tmp_path) == [tmp_path / "1.png"] and list_folder(f"{tmp_path / name}/") == []
    fail_to_list(monkeypatch, tmp_path / name, errno.EIO)
    for search in (find_images, lambda folder: list_folder(str(folder / name))):
        with pytest.raises(OSError, match=re.escape(name)):
            search(tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", [".", "cats/small"])
def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch, number, name):
    (tmp_path / "cats" / "small").mkdir(parents=True)
    (tmp_path / "cats" / "1.png").touch()
    unreadable = tmp_path / name
    fail_to_list(monkeypatch, unreadable, number)
    with pytest.raises(OSError, match=f"folder {unreadable} cannot be listed: {os.strerror(number)}; make it readable"):
        find_images(tmp_path)


def test_folders_without_images_say_what_they_have(tmp_path):
    (tmp_path / "a.gif").touch()
    with pytest.raises(ValueError, match=r"holds no images \(\.png, \.jpg, .*\.tiff\); it has 1 \.gif file"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match=r"a\.gif is not a folder; give the folder that holds the images"):
        find_images(tmp_path / "a.gif")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find_images(tmp_path / "nowhere")


def test_other_sizes_are_resized_and_cropped(tmp_path):
    (tmp_path / "a").mkdir()
    wide = np.zeros((40, 80, 3), dtype=np.uint8)
    wide[:, 20:60] = 200
    Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
    data = load_folder(tmp_path, 20)
    assert data.images.shape == (1, 3, 20, 20) and data.images[0, :, :, 3:-3].min() == 200


def test_hidden_files_and_folders_are_no_images_and_no_classes(small_cifar10):
    before = load_folder(small_cifar10 / "train", 32)
    (small_cifar10 / "train" / ".cache").mkdir()
    shutil.copy(next((small_cifar10 / "train" / "cat").iterdir()), small_cifar10 / "train" / "dog" / "._1.png")
    again = load_folder(small_cifar10 / "train", 32)
    assert again.classes == before.classes and torch.equal(again.images, before.images)


def test_what_is_held_out_of_two_datasets_together_is_of_both(small_cifar10, tmp_path):
    for name in ("imagenette2-320", "imagewoof2-320"):
        shutil.copytree(small_cifar10 / "train", tmp_path / name / "train")
    data = load_images("imagenet20", tmp_path, 32, holdout=20)
    assert len(data.train) == 60 and len(data.test) == 20
    assert {int(label) // 10 for label in data.test.labels} == {0, 1}


def test_without_training_images_nothing_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "read_images", lambda *args: pytest.fail("decoded"))
    for load in (load_images, lambda *args: open_labelled("imagenette", tmp_path, "train", 32)):
        with pytest.raises(ValueError, match="imagenette2-320 has no training images: only rotation accuracy"):
            load("imagenette", tmp_path, 32)


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
    with pytest.raises(ValueError, match=r"cannot be read .*--download"):
        load_cifar10(tmp_path, "train")


def test_images_that_do_not_decode_are_named(small_cifar10):
    file = next((small_cifar10 / "train" / "cat").iterdir())
    whole = file.read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file.name} does not decode"):
            load_cifar10(small_cifar10, "train")


def test_tinyimagenet_as_it_is_distributed(small_tinyimagenet):
    (small_tinyimagenet / "train" / ".DS_Store").write_bytes(b"")
    data = load_images("tinyimagenet", small_tinyimagenet, 128)
    assert data.name == "Tiny-ImageNet val" and data.train.classes == tuple(f"n{i:08d}" for i in range(10))
    assert data.train.images.shape == data.test.images.shape == (20, 3, 64, 64)
    assert data.test.labels.tolist() == [i // 2 for i in range(20)], "as val_annotations.txt says"
    assert torch.bincount(data.train.labels).tolist() == [2] * 10
    assert data.train.labels.tolist() != sorted(data.train.labels.tolist()), "the last ones are of all classes"
    held = load_images("tinyimagenet", small_tinyimagenet, 128, holdout=5)
    assert torch.equal(held.test.images, data.train.images[-5:])
    unlabelled = open_unlabelled("tinyimagenet", small_tinyimagenet, 64)
    assert isinstance(unlabelled, UnlabelledImages)
    unlabelled.read_all(quiet=True)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unlabelled.squares[order], data.train.images), "the same images"


def test_what_is_no_tinyimagenet(small_tinyimagenet, tmp_path):
    with pytest.raises(ValueError, match=r"no Tiny-ImageNet in .*nowhere"):
        tinyimagenet_files(tmp_path / "nowhere", "train")
    annotations = small_tinyimagenet / "val" / "val_annotations.txt"
    whole = annotations.read_text()
    for broken in (whole.replace("n00000003", "n99999999"), whole.replace("val_7.JPEG", "val_70.JPEG"), "rubbish\n"):
        annotations.write_text(broken)
        with pytest.raises(ValueError, match=r"val_annotations.txt, line \d+ names '.*' of '.*': no such image"):
            tinyimagenet_files(small_tinyimagenet, "test")
    annotations.unlink()
    with pytest.raises(ValueError, match=r"val_annotations.txt does not exist"):
        tinyimagenet_files(small_tinyimagenet, "test")
    for file in (small_tinyimagenet / "train" / "n00000003" / "images").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"class n00000003 of .* has no images"):
        tinyimagenet_files(small_tinyimagenet, "train")
