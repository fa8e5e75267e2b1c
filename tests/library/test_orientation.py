"""Which way up: the laws of the prediction, the EXIF orientation byte by byte, and files that are turned."""

import csv
import errno
import inspect
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import threading
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import timm
import torch
from conftest import SAMPLES
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, features
from torch import nn

import rotation_ssl  # noqa: F401  registers the models with timm
from rotation_ssl import cli, zoo
from rotation_ssl.cli import orient as orienting
from rotation_ssl.images import read_image
from rotation_ssl.models import ORIENTATION_MODEL
from rotation_ssl.orientation import calibration, predict_orientation, rotation_probabilities
from rotation_ssl.orientation.exif import read_orientation, turned, write_orientation
from rotation_ssl.orientation.predict import picture_squares
from rotation_ssl.orientation.turning import open_picture, turn_pixels, turn_tag, write_picture

PHOTOS = sorted((SAMPLES / "photos").glob("*.jpg"))
THUMB = 160  # pixels: what tests look at


@pytest.fixture(scope="module")
def model():
    return timm.create_model(ORIENTATION_MODEL, pretrained=True).eval()


def photo(file=PHOTOS[0]):
    image = read_image(file)
    image.thumbnail((THUMB, THUMB))
    return image


def encoded(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def tagged(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker of cameras"
    return exif


# the laws of the prediction


@given(seed=st.integers(0, 1000), k=st.integers(0, 3), temperature=st.floats(0.2, 5))
def test_turning_an_image_moves_the_answer_and_changes_nothing_else(seed, k, temperature):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 4))
    images = torch.randn(3, 3, 8, 8)
    before = rotation_probabilities(network, images, temperature)
    after = rotation_probabilities(network, torch.rot90(images, k, (-2, -1)), temperature)
    assert torch.allclose(after, before.roll(k, 1), atol=1e-6)
    assert torch.allclose(before.sum(1), torch.ones(3))


def test_the_average_is_over_the_four_turns():
    """A network that always says 'upright' says of each turn what it would have to be: all four are as likely."""

    class Upright(nn.Module):
        def forward(self, images):
            return torch.tensor([[2.0, 0, 0, 0]]).expand(len(images), 4)

    assert torch.allclose(rotation_probabilities(Upright(), torch.zeros(2, 3, 4, 4)), torch.full((2, 4), 0.25))


@pytest.mark.parametrize("file", PHOTOS, ids=lambda file: file.stem)
def test_of_a_turned_picture_it_says_so(model, file):
    upright = photo(file)
    (first,) = predict_orientation(model, [upright])
    turns = [upright.transpose(t) for t in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180)]
    for k, found in enumerate(predict_orientation(model, turns), 1):
        assert found.rotation == (first.rotation + k) % 4
        assert found.confidence == pytest.approx(first.confidence, abs=5e-3), "resizing rounds to whole grey values"
        assert (found.fix_cw + found.fix_ccw) % 360 == 0 and found.fix_cw == 90 * found.rotation


@pytest.mark.parametrize(
    ("weights", "clear"),
    [(ORIENTATION_MODEL, ("astronaut", "china")), ("rotnet_alexnet.photos", ("astronaut", "china", "rocket"))],
)
def test_sure_of_clear_pictures(weights, clear):
    model = timm.create_model(weights, pretrained=True).eval()
    found = {file.stem: predict_orientation(model, [photo(file)])[0] for file in PHOTOS}
    assert all(found[name].rotation == 0 and found[name].confidence > 0.8 for name in clear)
    assert all(found[name].confidence >= calibration(model).threshold for name in clear)


def test_the_network_is_asked_about_squares_of_the_size_that_was_fitted(model):
    seen = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    for size in (None, 96):
        predict_orientation(model, [photo(PHOTOS[0])], size=size)
    hook.remove()
    assert seen == [160, 96]
    entry = zoo.manifest()[ORIENTATION_MODEL]["orientation"]
    assert calibration(model) == (entry["size"], entry["temperature"], entry["threshold"])
    assert calibration(timm.create_model("resnet18", num_classes=4)) == (224, 1.0, None)
    picture = photo(PHOTOS[0])
    assert predict_orientation(model, [picture]) == predict_orientation(model, [picture], entry["temperature"])


@pytest.mark.parametrize(("size", "views"), [((64, 64), 1), ((69, 64), 1), ((71, 64), 2), ((40, 800), 2), ((1, 20), 2)])
def test_elongated_pictures_are_looked_at_in_the_centre_and_as_a_whole(size, views):
    width, height = size
    ramp = np.broadcast_to(np.linspace(0, 255, max(size)).round().astype(np.uint8), (min(size), max(size)))
    image = Image.fromarray(ramp if width > height else ramp.T.copy()).convert("RGB")
    squares = picture_squares(image, 16)
    assert squares.shape == (views, 3, 16, 16) and squares.dtype == torch.uint8
    center = 255 * min(size) / max(size)
    for square, span in zip(squares.float(), (center, 255), strict=False):
        assert square.mean() == pytest.approx(127.5, abs=255 / max(size)), "symmetric"
        seen = square.amax() - square.amin()
        assert seen == pytest.approx(span * 15 / 16, abs=span / 16 + 255 / max(size))


def test_other_heads_and_temperatures_are_refused(model):
    with pytest.raises(ValueError, match="4 outputs, one for each rotation; this one has 1000"):
        predict_orientation(timm.create_model("test_resnet"), [photo()])
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            predict_orientation(model, [photo()], wrong)
    assert predict_orientation(model, []) == []


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pictures_that_are_not_rgb_are_refused(model, mode):
    with pytest.raises(ValueError, match=f"images must be RGB, as .*read_image returns them, got mode {mode}"):
        predict_orientation(model, [photo(), photo().convert(mode)])
    assert len(predict_orientation(model, [read_image(photo().convert(mode))])) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_precision_gets_its_own(dtype):
    torch.manual_seed(0)
    small = timm.create_model("test_resnet", num_classes=4).eval()
    (expected,) = predict_orientation(small, [photo()])
    (found,) = predict_orientation(small.to(dtype), [photo()])
    assert found.probabilities == pytest.approx(expected.probabilities, abs=0.01)


# the EXIF orientation


def shown(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("before", [None, *range(1, 9)])
def test_what_is_written_is_what_viewers_show(form, before):
    image = Image.fromarray(np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3))
    lossless = {"lossless": True} if form == "WEBP" else {}
    content = encoded(image, form, **lossless, **({} if before is None else {"exif": tagged(before)}))
    with Image.open(io.BytesIO(content)) as opened:
        exif = read_orientation(opened)
    assert exif == (before or 1)
    for quarters in range(4):
        written = write_orientation(content, turned(exif, quarters))
        assert np.array_equal(shown(written), np.rot90(shown(content), -quarters))
        with Image.open(io.BytesIO(written)) as opened:
            assert before is None or opened.getexif()[0x010F] == "maker of cameras"
        if before is not None:
            changed = sum(a != b for a, b in zip(content, written, strict=True))
            assert changed <= (5 if form == "PNG" else 1), "the tag's byte, and a chunk's four of checksum"
        assert write_orientation(written, exif) == write_orientation(content, exif)


@pytest.mark.parametrize("order", ["<", ">"])
def test_only_the_tags_bytes_change(order):
    """A block with a value far away, which a writer that moves things would lose."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = [(0x010F, 2, 8, 60), (0x0112, 3, 1, 6 if order == "<" else 6 << 16), (0x8769, 4, 1, 40)]
    block = mark + struct.pack(f"{order}IH", 8, 3) + b"".join(struct.pack(f"{order}HHII", *e) for e in entries)
    block = (block + bytes(4)).ljust(60, b".") + b"makers!\0" + b"unknown bytes at the end"
    content = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + b"\xff\xda scan \xff\xd9"
    written = write_orientation(content, 3)
    assert len(written) == len(content)
    assert [i for i, (a, b) in enumerate(zip(content, written, strict=True)) if a != b] == [
        12 + 8 + 2 + 12 + 8 + (order == ">")
    ]
    untagged = content.replace(struct.pack(f"{order}HH", 0x0112, 3), struct.pack(f"{order}HH", 0x0113, 3))
    grown = write_orientation(untagged, 8)
    assert block[8:60].replace(b"\x12\x01", b"\x13\x01").replace(b"\x01\x12", b"\x01\x13") in grown
    assert b"unknown bytes at the end" in grown and grown.endswith(b"\xff\xda scan \xff\xd9")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"BM" + bytes(60), "has no EXIF orientation"),
        (b"\xff\xd8\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff\xff\xda", "damaged"),
        (b"\xff\xd8\xff\xe1\x00\x12Exif\0\0XX*\0\x08\0\0\0\0\0\xff\xda", "damaged"),
        (b"\xff\xd8\xff\xe1", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"RIFF\x10\0\0\0WEBPVP8L\xff\0\0\0", "damaged"),
        (b"II*\0\xff\0\0\0", "damaged"),
    ],
)
def test_damaged_files_are_refused(content, why):
    with pytest.raises(ValueError, match=why):
        write_orientation(content, 3)


@pytest.mark.parametrize("form", ["GIF", "AVIF", "PPM"])
def test_formats_that_are_not_written_say_what_to_do(tmp_path, form):
    if form not in Image.SAVE and not (Image.init() and form in Image.SAVE):
        pytest.skip(f"this Pillow has no {form}")
    file = tmp_path / "picture"
    file.write_bytes(encoded(photo(), form))
    for turn in (lambda: turn_tag(file, 1, 1), lambda: turn_pixels(file, 1)):
        with pytest.raises(ValueError, match=f"the format {form} are not written: convert it to JPEG or PNG first$"):
            turn()


def test_a_bmp_file_gets_its_pixels_turned(tmp_path):
    file = tmp_path / "picture.bmp"
    file.write_bytes(encoded(photo(), "BMP"))
    with pytest.raises(ValueError, match="no EXIF orientation that can be written: turn its pixels instead"):
        turn_tag(file, 1, 1)
    assert np.array_equal(shown(turn_pixels(file, 1)), np.rot90(shown(file.read_bytes()), -1))


@pytest.mark.parametrize(
    ("form", "what"), [("PNG", "frames"), ("WEBP", "frames"), ("TIFF", "pages"), ("MPO", "frames")]
)
def test_pictures_of_several_frames_keep_their_pixels(tmp_path, form, what):
    file, frames = tmp_path / "picture", [photo(PHOTOS[i]).resize((40, 30)) for i in (0, 1)]
    file.write_bytes(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
    with pytest.raises(ValueError, match=f"of its several {what} only one would be kept: write its EXIF orientation"):
        turn_pixels(file, 1)
    with Image.open(io.BytesIO(turn_tag(file, 1, 1))) as image:
        assert image.n_frames == 2 and read_orientation(image) == 6


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", [b"Exif\0\0XX*\0\x08\0\0\0\0\0", b"Exif\0\0II*"])
def test_a_picture_whose_exif_cannot_be_read_is_upright(tmp_path, form, block):
    file = tmp_path / "picture"
    file.write_bytes(encoded(photo(), form, exif=block, dpi=(72, 72)))
    picture = open_picture(file, 64)
    assert picture.exif == 1 and np.array_equal(np.asarray(picture.image), stored(file.read_bytes()))
    with pytest.raises(ValueError, match=r"cannot be turned: not a TIFF file"):
        turn_pixels(file, 1)


def test_a_picture_whose_exif_is_no_hexadecimal_text_is_upright(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 4\nno digits")
    file = tmp_path / "picture.png"
    file.write_bytes(encoded(photo(), "PNG", pnginfo=info))
    assert open_picture(file, 64).exif == 1


def stored(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="needs exiftool (Debian: libimage-exiftool-perl)")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exiftool_reads_what_is_written(tmp_path, form):
    for exif in ({}, {"exif": tagged(6)}):
        file = tmp_path / f"picture.{form.lower()}"
        file.write_bytes(write_orientation(encoded(photo(), form, **exif), 8))
        told = subprocess.run(
            ["exiftool", "-n", "-json", "-Orientation", "-Make", "-Warning", file], capture_output=True, check=True
        )
        (tags,) = json.loads(told.stdout)
        assert tags["Orientation"] == 8 and "Warning" not in tags
        assert not exif or tags["Make"] == "maker of cameras"


# the command


@pytest.fixture
def album(tmp_path):
    """Three clear photographs, turned by their pixels, by their tag, and not at all; and one of noise."""
    folder = tmp_path / "album"
    (folder / "deep").mkdir(parents=True)
    astronaut, china, rocket = (photo(SAMPLES / "photos" / f"{name}.jpg") for name in ("astronaut", "china", "rocket"))
    (folder / "pixels.jpg").write_bytes(encoded(astronaut.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95))
    (folder / "deep" / "tag.jpg").write_bytes(encoded(china, "JPEG", quality=95, exif=tagged(3)))
    (folder / "upright.png").write_bytes(encoded(rocket, "PNG"))
    noise = np.random.default_rng(0).integers(0, 255, (THUMB, THUMB, 3)).astype(np.uint8)
    (folder / "noise.png").write_bytes(encoded(Image.fromarray(noise), "PNG"))
    return folder


def orient(*arguments):
    return cli.main(["orient", *map(str, arguments)])


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def records(capsys):
    return {Path(r["path"]).name: r for r in map(json.loads, capsys.readouterr().out.splitlines())}


def test_a_dry_run_tells_and_changes_nothing(album, capsys):
    before = contents(album)
    assert orient(album, "--json") == 0
    found = records(capsys)
    fields = ["path", "rotation", "fix_cw", "fix_ccw", "exif", "exif_fixed", "confidence", "decided"]
    assert all(list(record) == [*fields, "outcome", "error"] for record in found.values())
    outcomes = {name: record["outcome"] for name, record in found.items()}
    assert outcomes["pixels.jpg"] == outcomes["tag.jpg"] == "to turn" and outcomes["noise.png"] == "undecided"
    assert [found["pixels.jpg"][key] for key in fields[1:6]] == [1, 90, 270, 1, 6] and found["pixels.jpg"]["decided"]
    assert [found["tag.jpg"][key] for key in fields[1:6]] == [2, 180, 180, 3, 1] and found["tag.jpg"]["decided"]
    assert [found["upright.png"][key] for key in fields[1:6]] == [0, 0, 0, 1, 1]
    assert not found["noise.png"]["decided"]
    assert contents(album) == before
    assert orient(album, "--threshold", 0.6) == 0
    told = capsys.readouterr().out
    assert "4 pictures: 1 upright, 2 to turn (nothing is written without --apply), 1 undecided" in told


def test_the_calibration_of_the_weights_is_what_counts_without_options(album, capsys, monkeypatch):
    entry, asked = zoo.manifest()[ORIENTATION_MODEL]["orientation"], []

    def recorded(*arguments, **options):
        asked.append(inspect.signature(predict_orientation).bind(*arguments, **options).arguments)
        return predict_orientation(*arguments, **options)

    monkeypatch.setattr(orienting, "predict_orientation", recorded)
    assert orient(album / "pixels.jpg") == 0
    assert [(one["size"], one["temperature"]) for one in asked] == [(entry["size"], entry["temperature"])]
    assert f"undecided at a threshold of {entry['threshold']:.4g}" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["exif", "pixels"])
def test_what_is_fixed_is_shown_upright_and_a_second_run_changes_nothing(album, capsys, how):
    before = contents(album)
    assert orient(album, "--apply", how, "--in-place") == 0
    after = contents(album)
    assert {name for name in before if before[name] != after[name]} == {"pixels.jpg", "deep/tag.jpg"}
    for name in ("pixels.jpg", "deep/tag.jpg"):
        with Image.open(album / name) as image:
            stored = np.asarray(image)
        with Image.open(io.BytesIO(before[name])) as image:
            if how == "exif":
                assert np.array_equal(stored, np.asarray(image)) and len(after[name]) - len(before[name]) in (0, 36)
            else:
                close = np.abs(stored.astype(int) - np.rot90(np.asarray(image), -1 if name == "pixels.jpg" else 0))
                assert close.mean() < 3
    capsys.readouterr()
    assert orient(album, "--json") == 0
    assert all(record["rotation"] == 0 for record in records(capsys).values() if record["decided"])
    assert orient(album, "--apply", how, "--in-place") == 0
    assert contents(album) == after


def test_a_picture_of_several_names_is_turned_once(album, capsys):
    (album / "link.jpg").symlink_to("pixels.jpg")
    assert orient(album, album / ".." / "album", "--threshold", 0.6, "--apply", "pixels", "--in-place") == 0
    assert "4 pictures: 1 upright, 2 turned, 1 undecided" in capsys.readouterr().out
    assert orient(album / "pixels.jpg") == 0
    assert "1 picture: 1 upright" in capsys.readouterr().out


def test_fixed_pictures_go_to_a_folder_and_keep_permissions_and_times(album, tmp_path, capsys):
    before, source = contents(album), album / "pixels.jpg"
    source.chmod(0o640)
    os.utime(source, ns=(1_500_000_000_000_000_000, 1_500_000_000_000_000_000))
    assert orient(album, "--apply", "exif", "-o", tmp_path / "fixed", "--keep-times", "--csv", tmp_path / "t.csv") == 0
    assert set(contents(tmp_path / "fixed")) == {"pixels.jpg", "deep/tag.jpg"} and contents(album) == before
    state = (tmp_path / "fixed" / "pixels.jpg").stat()
    assert state.st_mode & 0o777 == 0o640 and state.st_mtime_ns == 1_500_000_000_000_000_000
    with (tmp_path / "t.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 and {row["fix_ccw"] for row in rows if row["path"].endswith("pixels.jpg")} == {"270"}


def test_other_files_in_the_folder_of_fixed_pictures_are_kept(album, tmp_path, capsys):
    fixed = ["--apply", "exif", "-o", tmp_path / "fixed"]
    assert orient(album, *fixed) == 0 and orient(album, *fixed) == 0
    whole, other = contents(tmp_path / "fixed"), tmp_path / "fixed" / "deep" / "tag.jpg"
    other.write_bytes(b"somebody's")
    capsys.readouterr()
    assert orient(album, *fixed) == 1
    told = capsys.readouterr()
    assert f"{other} exists and is another file: give another -o DIR, or --force" in told.err and "1 failed" in told.out
    assert other.read_bytes() == b"somebody's"
    assert orient(album, *fixed, "--force") == 0 and contents(tmp_path / "fixed") == whole
    table = tmp_path / "table.csv"
    table.write_text("mine")
    assert orient(album, "--csv", table) == 2 and table.read_text() == "mine"
    assert orient(album, "--csv", table, "--force") == 0 and table.read_text().startswith("path,")


def test_broken_and_odd_pictures_are_named_and_the_others_go_on(album, capsys):
    (album / "cut.jpg").write_bytes((album / "pixels.jpg").read_bytes()[:400])
    (album / "empty.png").write_bytes(b"")
    Image.new("CMYK", (40, 30)).save(album / "cmyk.jpg")
    Image.new("RGB", (1, 1)).save(album / "pixel.png")
    Image.new("RGB", (2000, 100)).save(album / "panorama.png")
    Image.fromarray(np.full((30, 40), 40000, np.uint16)).save(album / "deep.png")
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(album / "moving.webp", save_all=True, append_images=frames[1:])
    assert orient(album, album / "gone.jpg", "--json") == 1
    told = capsys.readouterr()
    failed = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert len(failed) == 3 and all(name in told.err for name in ("cut.jpg", "empty.png", "gone.jpg"))
    rows = {Path(row["path"]).name: row for row in map(json.loads, told.out.splitlines())}
    assert len(rows) == 12
    for name in ("cut.jpg", "empty.png", "gone.jpg"):
        *known, outcome, error = list(rows[name].values())[1:]
        assert known == [None] * 7 and outcome == "failed" and f"error: {error}" in failed and name in error
    assert sum(row["outcome"] == "failed" for row in rows.values()) == 3


def test_the_table_says_what_became_of_each_picture(album, tmp_path, capsys):
    sideways = photo(SAMPLES / "photos" / "china.jpg").transpose(Image.Transpose.ROTATE_90)
    sideways.convert("CMYK").save(album / "cmyk.jpg")
    (album / "cut.jpg").write_bytes(b"no picture")
    found = {}
    for how in ("exif", "pixels"):
        table = tmp_path / f"{how}.csv"
        fixed = ["--threshold", 0.6, "--apply", how, "-o", tmp_path / how]
        assert orient(album, *fixed, "--csv", table) == 1
        told = capsys.readouterr()
        with table.open() as stream:
            found[how] = {Path(row["path"]).name: row for row in csv.DictReader(stream)}
        assert list(found[how]) == ["cmyk.jpg", "cut.jpg", "tag.jpg", "noise.png", "pixels.jpg", "upright.png"]
        for name, row in found[how].items():
            assert bool(row["error"]) == (row["outcome"] == "failed") and (row["error"] in told.err), name
            if row["outcome"] == "turned":
                with Image.open(next((tmp_path / how).rglob(name))) as image:
                    assert read_orientation(image) == int(row["exif_fixed"]), "what the written file shows"
        outcomes = {name: row["outcome"] for name, row in found[how].items()}
        assert outcomes == {
            "cmyk.jpg": "turned" if how == "exif" else "failed", "cut.jpg": "failed", "tag.jpg": "turned",
            "noise.png": "undecided", "pixels.jpg": "turned", "upright.png": "upright",
        }  # fmt: skip
        assert set(list(found[how]["cut.jpg"].values())[1:-2]) == {""}
    assert (found["exif"]["pixels.jpg"]["exif_fixed"], found["pixels"]["pixels.jpg"]["exif_fixed"]) == ("6", "1")
    assert "CMYK pixels of a JPEG file" in found["pixels"]["cmyk.jpg"]["error"]
    assert orient(album, *fixed) == 1
    lines = capsys.readouterr().out.splitlines()
    header = lines[0].index("picture")
    assert [line[header:] for line in lines if line.endswith("(failed)")] == [
        f"{album / name}  (failed)" for name in ("cmyk.jpg", "cut.jpg")
    ]


def test_a_disk_that_fails_at_a_picture_does_not_stop_the_others(album, capsys, monkeypatch):
    load = JpegImagePlugin.JpegImageFile.load

    def fail_at_one(image):
        if Path(image.filename).name == "pixels.jpg":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return load(image)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", fail_at_one)
    assert orient(album, "--json") == 1
    told = capsys.readouterr()
    assert f"image {album / 'pixels.jpg'} cannot be read, try again: Input/output error" in told.err
    assert len(told.out.splitlines()) == 4 and told.out.count('"outcome": "failed"') == 1


def test_what_cannot_be_written_is_named_and_left(album, capsys):
    (album / "pixels.jpg").chmod(0o444)
    (album / "deep" / "tag.jpg").rename(album / "deep" / "tag.tmp.jpg")
    before = contents(album)
    assert orient(album, "--threshold", 0.6, "--apply", "exif", "--in-place") == 1
    told = capsys.readouterr()
    assert "pixels.jpg is read-only: make it writable, or give -o DIR" in told.err
    assert "1 upright, 1 turned, 1 undecided at a threshold of 0.6, 1 failed" in told.out
    assert contents(album)["pixels.jpg"] == before["pixels.jpg"]
    frames = [photo(PHOTOS[i]).resize((90, 90)).transpose(Image.Transpose.ROTATE_90) for i in (0, 2)]
    frames[0].save(album / "moving.webp", save_all=True, append_images=frames[1:])
    assert orient(album / "moving.webp", "--apply", "pixels", "--in-place") == 1
    assert "the pixels of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--apply", "exif"], "--apply needs -o DIR or --in-place"),
        (["-o", "fixed"], "-o and --in-place need --apply exif or --apply pixels"),
        (["--in-place"], "-o and --in-place need --apply"),
        (["--keep-times"], "--keep-times is for the pictures that --apply changes"),
        (["--threshold", "1.5"], "--threshold must be 0 to 1, got 1.5"),
        (["--csv", "nowhere/t.csv"], "cannot be written: nowhere is not a folder"),
        (["--csv", "album/noise.png"], "album/noise.png is one of the images"),
    ],
)
def test_options_that_do_not_fit_are_refused(album, capsys, monkeypatch, arguments, why):
    monkeypatch.chdir(album.parent)
    before = contents(album)
    assert cli.main(["orient", str(album), *arguments]) == 2
    assert why in capsys.readouterr().err and contents(album) == before


def test_an_interrupted_run_says_what_it_has_changed(album, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(orienting, "BATCH", 1)
    seen = iter(range(2))

    def predict_or_stop(*arguments, **options):
        if next(seen, None) is None:
            raise KeyboardInterrupt
        return predict_orientation(*arguments, **options)

    monkeypatch.setattr(orienting, "predict_orientation", predict_or_stop)
    assert orient(album, "--apply", "exif", "--in-place", "--csv", tmp_path / "t.csv") == 130
    with (tmp_path / "t.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 2


def test_a_run_interrupted_while_it_writes_says_what_it_has_changed(album, tmp_path, capsys, monkeypatch):
    before, table = contents(album), tmp_path / "t.csv"
    written, interrupted = threading.Event(), threading.Event()
    write, wait = orienting.write_picture, orienting.wait

    def write_and_interrupt(source, *arguments):
        if source.name == "tag.jpg":
            # the first picture is still being written when a later one is done and Ctrl-C comes
            assert written.wait(30)
            # a signal just before the main thread waits does not wake it
            for _ in range(10):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                if interrupted.wait(3):
                    break
            assert interrupted.is_set()
        write(source, *arguments)
        if source.name == "pixels.jpg":
            written.set()

    monkeypatch.setattr(orienting, "write_picture", write_and_interrupt)
    monkeypatch.setattr(orienting, "wait", lambda futures: interrupted.set() or wait(futures))
    assert orient(album, "--apply", "exif", "--in-place", "--csv", table, "--workers", 2) == 130
    after = contents(album)
    assert {name for name in before if before[name] != after[name]} == {"pixels.jpg", "deep/tag.jpg"}
    with table.open() as stream:
        shown = {Path(row["path"]).relative_to(album).as_posix(): row["outcome"] for row in csv.DictReader(stream)}
    assert shown["pixels.jpg"] == shown["deep/tag.jpg"] == "turned" and list(shown) == sorted(shown)


def test_a_run_that_breaks_while_it_writes_says_of_which_picture(album, tmp_path, monkeypatch):
    write, table = orienting.write_picture, tmp_path / "t.csv"

    def write_or_break(source, *arguments):
        if source.name == "tag.jpg":
            raise MemoryError("no room")
        write(source, *arguments)

    monkeypatch.setattr(orienting, "write_picture", write_or_break)
    assert orient(album, "--apply", "exif", "--in-place", "--csv", table, "--workers", 4) == 2
    with table.open() as stream:
        rows = {Path(row["path"]).name: (row["outcome"], row["error"]) for row in csv.DictReader(stream)}
    assert rows["tag.jpg"] == ("failed", "no room")


def test_a_model_without_a_fitted_threshold_needs_one(album, capsys):
    assert cli.main(["orient", str(album), "--model", "rotnet_nin"]) == 2
    assert "no threshold is known for rotnet_nin: give --threshold" in capsys.readouterr().err


def test_a_picture_that_is_replaced_keeps_its_owner(tmp_path, monkeypatch):
    file, given = tmp_path / "picture.jpg", []
    file.write_bytes(b"before")
    file.chmod(0o640)

    def refuse(path, uid, gid):
        given.append((path.parent, uid, gid, path.read_bytes()))
        raise PermissionError

    monkeypatch.setattr(os, "chown", refuse, raising=False)
    write_picture(file, file, b"after", keep_times=False)
    write_picture(file, tmp_path / "new.jpg", b"after", keep_times=False)
    owner = file.stat()
    assert given == [(tmp_path, owner.st_uid, owner.st_gid, b"after")], "a new file is its writer's"
    assert file.read_bytes() == b"after" and owner.st_mode & 0o777 == 0o640


@pytest.mark.parametrize("mode", [0o640, 0o444])
def test_a_picture_that_is_written_keeps_its_extended_attributes(tmp_path, monkeypatch, mode):
    file, new = tmp_path / "picture.jpg", tmp_path / "new.jpg"
    file.write_bytes(b"before")
    try:
        for name in ("user.baloo.rating", "user.xdg.tags"):
            os.setxattr(file, name, b"8")
    except (AttributeError, OSError) as error:
        pytest.skip(f"extended attributes of files in {tmp_path} cannot be set: {error}")
    file.chmod(mode)
    write_picture(file, new, b"after", keep_times=False)
    assert {name: os.getxattr(new, name) for name in os.listxattr(new) if name.startswith("user.")} == {
        "user.baloo.rating": b"8",
        "user.xdg.tags": b"8",
    }
    assert new.stat().st_mode & 0o777 == mode
    file.chmod(0o640)
    write, refused = os.setxattr, []

    def refuse_one(path, name, value):
        if name == "user.baloo.rating":
            refused.append(name)
            raise PermissionError
        write(path, name, value)

    monkeypatch.setattr(os, "setxattr", refuse_one)
    write_picture(file, file, b"after", keep_times=False)
    assert file.read_bytes() == b"after" and refused == ["user.baloo.rating"]
    assert [name for name in os.listxattr(file) if name.startswith("user.")] == ["user.xdg.tags"]
    with monkeypatch.context() as patched:
        patched.setattr("sys.platform", "darwin")
        patched.delattr(os, "listxattr")
        write_picture(file, file, b"without", keep_times=False)
    assert file.read_bytes() == b"without"


def test_two_pictures_for_one_file_are_refused(album, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    shutil.copy(album / "pixels.jpg", tmp_path / "other")
    assert orient(album, tmp_path / "other", "--apply", "exif", "-o", tmp_path / "fixed") == 2
    assert "two pictures would be written to" in capsys.readouterr().err
    assert not (tmp_path / "fixed").exists()


@pytest.mark.parametrize(("paths", "output"), [(".", "."), ("pixels.jpg", "."), ("deep", "."), (".", "../link")])
def test_an_output_folder_that_is_the_pictures_own_is_refused(album, capsys, monkeypatch, paths, output):
    monkeypatch.chdir(album)
    (album / "tag.jpg").write_bytes((album / "deep" / "tag.jpg").read_bytes())
    (album.parent / "link").symlink_to(album)
    before = contents(album)
    asked = [paths, "tag.jpg"] if paths == "deep" else [paths]
    assert orient(*asked, "--apply", "exif", "-o", output) == 2
    assert re.search(r"would be replaced: give another -o DIR|two pictures would be", capsys.readouterr().err)
    assert contents(album) == before


@pytest.mark.parametrize("output", ["album/fixed", "album/deep/fixed", "link/fixed", "album/../album/fixed"])
def test_an_output_folder_inside_the_pictures_folder_is_refused_at_once(album, capsys, monkeypatch, output):
    monkeypatch.chdir(album.parent)
    Path("link").symlink_to("album")
    before = contents(album)
    monkeypatch.setattr(orienting, "load_model", lambda *_: pytest.fail("the model is loaded first"))
    assert orient("album", "--apply", "exif", "-o", output) == 2
    told = capsys.readouterr().err
    assert told == f"error: {output} is inside album, where the next run would find it: give another -o DIR\n"
    assert contents(album) == before


def test_an_output_folder_behind_a_link_of_the_pictures_folder_is_not_searched(album, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (album / "fixed").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        assert orient(album, "--apply", "exif", "-o", album / "fixed") == 0
    assert orient(album / "pixels.jpg", "--apply", "exif", "-o", album / "beside") == 0


def test_large_jpegs_are_decoded_at_a_part_of_their_size(tmp_path):
    file = tmp_path / "large.jpg"
    Image.new("RGB", (4000, 3000), "green").save(file)
    assert min(open_picture(file, 128).image.size) < 600


def test_pixels_of_a_png_lose_nothing(tmp_path):
    file, values = tmp_path / "grey.png", np.arange(12 * 20, dtype=np.uint16).reshape(12, 20) * 200
    Image.fromarray(values).save(file, dpi=(300, 300))
    with Image.open(io.BytesIO(turn_pixels(file, 1))) as image:
        assert np.array_equal(np.asarray(image), np.rot90(values, -1)) and round(image.info["dpi"][0]) == 300


def test_pixels_of_a_tiff_keep_what_describes_it(tmp_path):
    file, values = tmp_path / "scan.tif", np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)
    exif = tagged(6)
    exif[ExifTags.Base.Artist] = "someone"
    Image.fromarray(values).save(file, compression="tiff_lzw", dpi=(300, 300), exif=exif)
    with Image.open(io.BytesIO(turn_pixels(file, 1))) as image:
        kept = image.getexif()
        assert image.size == (20, 12) and np.array_equal(np.asarray(image), np.rot90(values, 2))
        assert ExifTags.Base.Orientation not in kept and kept[ExifTags.Base.Artist] == "someone"
        assert image.info["compression"] == "tiff_lzw" and round(image.info["dpi"][0]) == 300
    taken = {int(ExifTags.Base.DateTimeOriginal): "2020:02:02 20:20:20"}
    exif.get_ifd(ExifTags.IFD.Exif).update(taken)
    exif[ExifTags.IFD.Exif] = taken
    Image.fromarray(values).save(file, exif=exif)
    with pytest.raises(ValueError, match="its EXIF block would be lost: write its EXIF orientation instead"):
        turn_pixels(file, 1)
    with Image.open(io.BytesIO(turn_tag(file, 6, 1))) as image:
        assert image.getexif().get_ifd(ExifTags.IFD.Exif) == taken


def deep_png(colour, channels):
    """A PNG of 16 bits: Pillow writes none in colour or with transparency."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 2, 16, colour, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(8 * channels))) * 2)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def deep_tiff(bits, channels, photometric, **tags):
    """A TIFF of more than 8 bits, not compressed."""
    data, directory, stream = bytes(range(bits * channels)), TiffImagePlugin.ImageFileDirectory_v2(), io.BytesIO()
    entries = {
        "ImageWidth": 4, "ImageLength": 2, "BitsPerSample": (bits,) * channels, "Compression": 1,
        "PhotometricInterpretation": photometric, "StripOffsets": 0, "SamplesPerPixel": channels, "RowsPerStrip": 2,
        "StripByteCounts": len(data),
    } | tags  # fmt: skip
    for name, value in entries.items():
        directory[getattr(ExifTags.Base, name)] = value
    directory.save(stream)
    return stream.getvalue() + data


TO_8_BITS = "its 16 bits per colour would become 8"
LOSSY = {
    "rgb.png": (lambda: deep_png(2, 3), TO_8_BITS),
    "grey-and-alpha.png": (lambda: deep_png(4, 2), TO_8_BITS),
    "rgba.png": (lambda: deep_png(6, 4), TO_8_BITS),
    "rgb.tif": (lambda: deep_tiff(16, 3, 2), TO_8_BITS),
    "rgba.tif": (lambda: deep_tiff(16, 4, 2, ExtraSamples=2), TO_8_BITS),
    "planes.tif": (lambda: deep_tiff(16, 3, 2, PlanarConfiguration=2), TO_8_BITS),
    "12-bits.tif": (lambda: deep_tiff(12, 1, 1), "its 12-bit grey would become darker"),
    "white-is-zero.tif": (lambda: deep_tiff(16, 1, 0), "its white is zero, so it would become a negative"),
    "jpeg.tif": (lambda: encoded(photo(), "TIFF", compression="jpeg"), "its jpeg compression would lose quality again"),
}


@pytest.mark.skipif(not features.check("libtiff"), reason="needs a Pillow with libtiff")
@pytest.mark.parametrize("name", LOSSY)
def test_pixels_that_would_change_are_refused(tmp_path, name):
    (make, why), file = LOSSY[name], tmp_path / name
    file.write_bytes(make())
    with pytest.raises(ValueError, match=f"the pixels of {file} cannot be turned: {why}: write its EXIF orientation"):
        turn_pixels(file, 1)
    with Image.open(io.BytesIO(turn_tag(file, 1, 1))) as image:
        assert image.getexif()[ExifTags.Base.Orientation] == 6


@pytest.mark.parametrize("values", [np.uint8, np.uint16, ">u2", bool])
def test_pixels_of_a_tiff_lose_nothing(tmp_path, values):
    file, grey = tmp_path / "grey.tif", np.arange(12 * 20).reshape(12, 20).astype(values)
    Image.fromarray(grey).save(file, tiffinfo={262: 0} if grey.itemsize == 1 else {})
    with Image.open(io.BytesIO(turn_pixels(file, 1))) as image:
        assert np.array_equal(np.asarray(image), np.rot90(grey, -1))


XMP = b'<x:xmpmeta xmlns:tiff="t"><rdf:li %s>a caption</rdf:li></x:xmpmeta>'
TURNED_XMP, UPRIGHT_XMP = (XMP % orientation for orientation in (b'tiff:Orientation="6"', b""))


def segment(marker, data):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def of_jpeg(*segments, end=b""):
    """A JPEG file with more segments, and with bytes after its end."""
    content = encoded(photo(), "JPEG", quality=95)
    return content[:20] + b"".join(segments) + content[20:] + end


IPTC = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", 8) + b"\x1c\x02\x78\0\x03sea\0"
SECOND_IMAGE = "it holds more than its image, such as a second one or a video, which would be lost"
# two pictures, as MPF lists them, and the XMP of a gain map: Pillow then reads the first one as a plain JPEG
GAIN_MAP = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<rdf hdrgm:Version="1.0"/>') + segment(
    0xE2,
    b"MPF\0MM\0*"
    + struct.pack(">IHHHI4sHHIIHHIII32x", 8, 3, 0xB000, 7, 4, b"0100", 0xB001, 4, 1, 2, 0xB002, 7, 32, 50, 0),
)
MORE_IN_JPEG = {
    "ultra-hdr": (lambda: of_jpeg(GAIN_MAP), SECOND_IMAGE),
    "motion": (lambda: of_jpeg(end=b"\0\0\0\x18ftypmp42"), SECOND_IMAGE),
    "second": (lambda: of_jpeg(end=encoded(photo(), "JPEG")), SECOND_IMAGE),
    "iptc": (lambda: of_jpeg(segment(0xED, IPTC)), "its IPTC or Photoshop block would be lost"),
    "long-xmp": (
        lambda: of_jpeg(segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0...")),
        "its XMP, which is longer",
    ),
}


@pytest.mark.parametrize("name", MORE_IN_JPEG)
def test_a_jpeg_that_would_lose_what_it_holds_is_refused(tmp_path, name):
    (make, why), file = MORE_IN_JPEG[name], tmp_path / f"{name}.jpg"
    file.write_bytes(make())
    with pytest.raises(ValueError, match=f"the pixels of {file} cannot be turned: {why}.*: write its EXIF orientation"):
        turn_pixels(file, 1)
    assert len(turn_tag(file, 1, 1)) == len(make()) + 36, "nothing is lost so"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"exif": "thumbnail"}])
def test_a_jpeg_without_more_is_turned(tmp_path, options):
    """Its end is found behind several scans, restarts, and a thumbnail that has an end as well; padding is nothing."""
    file, exif = tmp_path / "plain.jpg", tagged(6)
    exif[ExifTags.Base.MakerNote] = encoded(photo().resize((8, 8)), "JPEG")
    content = encoded(photo(), "JPEG", **options | ({"exif": exif} if "exif" in options else {}))
    file.write_bytes(content + bytes(4096) + b"\r\n")
    assert shown(turn_pixels(file, 1)).shape == np.rot90(shown(content)).shape


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6, 7])
@pytest.mark.parametrize("quarters", [1, 2])
def test_exif_tells_the_size_that_is_written(tmp_path, form, orientation, quarters):
    file, exif = tmp_path / "sized", tagged(orientation)
    taken = {0xA002: 60, 0xA003: 40, 0x829A: 0.5, 0x927C: b"notes"}
    exif[ExifTags.IFD.Exif] = taken
    exif[0x0100], exif[0x0101] = 60, 40
    file.write_bytes(encoded(photo().resize((60, 40)), form, exif=exif))
    with Image.open(io.BytesIO(turn_pixels(file, quarters))) as image:
        assert (image.getexif()[0x0100], image.getexif()[0x0101]) == image.size
        kept = image.getexif().get_ifd(ExifTags.IFD.Exif)
        assert (kept[0xA002], kept[0xA003]) == image.size and kept[0x829A] == 0.5
        assert kept[0x927C] == b"notes" and set(kept) == set(taken)
        assert image.size == ((60, 40) if (orientation > 4) == (quarters % 2 == 1) else (40, 60))


def test_the_thumbnail_of_a_picture_whose_pixels_are_turned_is_left_out(tmp_path):
    block = bytearray(tagged(6).tobytes()[6:])
    # the list of tags ends in the place of the next one, which lists the thumbnail
    (first,) = struct.unpack_from(">I", block, 4)
    (count,) = struct.unpack_from(">H", block, first)
    struct.pack_into(">I", block, first + 2 + 12 * count, len(block))
    thumbnail, start = encoded(photo().resize((8, 8)), "JPEG"), len(block) + 2 + 3 * 12 + 4
    entries = [(0x0103, 3, 1, 6 << 16), (0x0201, 4, 1, start), (0x0202, 4, 1, len(thumbnail))]
    block += struct.pack(">H", 3) + b"".join(struct.pack(">HHII", *entry) for entry in entries) + bytes(4) + thumbnail
    file = tmp_path / "camera.jpg"
    file.write_bytes(encoded(photo(), "JPEG", exif=b"Exif\0\0" + bytes(block)))
    assert thumbnail in turn_tag(file, 6, 1)
    written = turn_pixels(file, 1)
    with Image.open(io.BytesIO(written)) as image:
        assert image.getexif()[0x010F] == "maker of cameras"
    assert thumbnail not in written


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
@pytest.mark.parametrize("exif", [{}, {"exif": tagged(6)}])
def test_xmp_is_kept_without_an_orientation(tmp_path, monkeypatch, form, exif):
    file = tmp_path / "captioned"
    if form == "JPEG" and int(PIL.__version__.split(".")[0]) < 11:
        pytest.skip("before version 11 Pillow does not write the XMP of JPEG files")
    file.write_bytes(encoded(photo(), form, xmp=TURNED_XMP, **exif))
    with Image.open(io.BytesIO(turn_pixels(file, 1))) as image:
        assert image.info["xmp"] == UPRIGHT_XMP and read_orientation(image) == 1
    # older versions of Pillow do not write that of JPEG files
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda *given, xmp, **options: save(*given, **options))
    with pytest.raises(ValueError, match="its XMP would be lost: install Pillow 11 or newer"):
        turn_pixels(file, 1)


def test_text_colours_and_time_of_a_png_are_kept(tmp_path):
    file, info = tmp_path / "text.png", PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat, steps: 20", zip=True)
    info.add_itxt("Title", "Überschrift", "de", "Bildname")
    info.add_text("Raw profile type exif", "\nexif\n 26\n" + tagged(6).tobytes().hex())
    colours = [(b"gAMA", struct.pack(">I", 45455)), (b"cHRM", bytes(32)), (b"sRGB", b"\0")]
    for kind, data in (*colours, (b"tIME", bytes((7, 228, 2, 2, 20, 20, 20)))):
        info.add(kind, data)
    for zipped in (False, True):
        info.add_itxt("XML:com.adobe.xmp", TURNED_XMP.decode(), zip=zipped)
    file.write_bytes(encoded(photo(), "PNG", pnginfo=info))
    content, written = file.read_bytes(), turn_pixels(file, 1)
    before, after = png_chunks(content), png_chunks(written)
    kept = {b"zTXt", b"gAMA", b"cHRM", b"sRGB", b"tIME"}
    assert [c for c in after if c[0] in kept] == [c for c in before if c[0] in kept] and len(kept) == 5
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + UPRIGHT_XMP
    assert [data for kind, data in after if kind == b"iTXt"] == [next(d for k, d in before if k == b"iTXt"), xmp, xmp]
    assert not [data for kind, data in after if kind == b"tEXt"], "its orientation contradicts"
    with Image.open(io.BytesIO(written)) as image:
        assert read_orientation(image) == 1 and image.getexif()[0x010F] == "maker of cameras"
    assert np.array_equal(shown(written), np.rot90(shown(content), -1))
    info.add_text("Raw profile type APP1", "\ngeneric profile\n 26\n")
    file.write_bytes(encoded(photo(), "PNG", pnginfo=info))
    with pytest.raises(ValueError, match="the EXIF tags in its text would be lost: write its EXIF orientation instead"):
        turn_pixels(file, 1)


def png_chunks(content):
    """Kind and data of each chunk, whose checksum is right."""
    found, at = [], 8
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        found.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        assert zlib.crc32(b"".join(found[-1])) == int.from_bytes(content[at + 8 + length : at + 12 + length], "big")
        at += 12 + length
    return found


def test_heic_pictures_are_listed_and_not_turned_twice(album, capsys, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    upright = photo(SAMPLES / "photos" / "astronaut.jpg")
    (album / "phone.heic").write_bytes(encoded(upright, "HEIF", exif=tagged(1)))
    (album / "turned.heic").write_bytes(encoded(upright.transpose(Image.Transpose.ROTATE_90), "HEIF"))
    before = contents(album)
    assert orient(album, "--json") == 0
    found = records(capsys)
    assert [(found[f"{name}.heic"]["rotation"], found[f"{name}.heic"]["exif"]) for name in ("phone", "turned")] == [
        (0, 1),
        (1, 1),
    ]
    for how in ("exif", "pixels"):
        assert orient(album / "turned.heic", "--apply", how, "--in-place") == 1
        told = capsys.readouterr().err
        assert "pictures of the format HEIF are not written: convert it to JPEG or PNG first" in told
    assert contents(album) == before
    monkeypatch.setattr("rotation_ssl.cli.orient.register_heif", lambda: False)
    assert orient(album / "phone.heic") == 2
    assert "need pillow-heif: pip install 'rotation-ssl[heif]'" in capsys.readouterr().err
