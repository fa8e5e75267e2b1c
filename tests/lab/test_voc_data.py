"""The standard layout is read as it is meant, and what is wrong with it is said with the file's name."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_voc import write_small_voc

from training.transfer.data import (
    CLASSES,
    check_large_enough,
    class_labels,
    open_mask,
    open_pixels,
    pixels_tensor,
    read_annotations,
    read_masks,
)


@pytest.fixture
def devkit(tmp_path):
    return write_small_voc(tmp_path, train=6, test=4)


def change(devkit, old, new, name="000001"):
    """Edit an annotation; returns its file."""
    file = devkit / "VOC2007" / "Annotations" / f"{name}.xml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def first_side(devkit, side):
    text = (devkit / "VOC2007" / "Annotations" / "000001.xml").read_text()
    return f"<{side}>{text.split(f'<{side}>')[1].split('<')[0]}</{side}>"


def test_the_twenty_classes():
    assert len(CLASSES) == 20 and list(CLASSES) == sorted(CLASSES)


def test_objects_are_where_they_were_put(devkit):
    images = read_annotations(devkit, "2007", "trainval")
    assert [image.name for image in images] == [f"{i:06d}" for i in range(1, 7)]
    # the folder that holds VOCdevkit will do as well
    assert len(read_annotations(devkit.parent, "2007", "test")) == 4
    masks = read_masks(devkit, "2007", "trainval")
    for image, masked in zip(images, masks, strict=True):
        assert (image.width, image.height) == (masked.width, masked.height) == (160, 128)
        assert image.file == masked.file and len(image.boxes) == len(image.labels) == len(image.difficult) > 0
        mask = open_mask(masked.mask, len(CLASSES))
        for box, label in zip(image.boxes.int().tolist(), image.labels, strict=True):
            left, top, right, bottom = box
            inside = mask[top:bottom, left:right]
            assert (inside[2:-2, 2:-2] == label + 1).all() and (inside[:2] == 255).all()
        # boxes are pixel edges: nothing of an object is outside of them
        covered = sum(int((right - left) * (bottom - top)) for left, top, right, bottom in image.boxes.int().tolist())
        assert int((mask > 0).sum()) == covered
    assert {CLASSES[label] for image in images for label in image.labels} == {"aeroplane", "car"}


def test_labels_of_difficult_objects_do_not_count(devkit):
    change(devkit, "<difficult>0</difficult>", "<difficult>1</difficult>")
    images = read_annotations(devkit, "2007", "train")
    labels = class_labels(images, len(CLASSES))
    assert labels.shape == (3, 20) and set(labels.unique().tolist()) <= {-1, 0, 1}
    assert (labels[0, images[0].labels] == -1).all() and (labels[0] == 1).sum() == 0
    # a class that is difficult here and plain there is shown
    images[0].difficult[:] = torch.arange(len(images[0].difficult)) > 0
    assert class_labels(images[:1], len(CLASSES))[0, images[0].labels[0]] == 1


def test_an_image_without_objects_is_one(devkit):
    file = devkit / "VOC2007" / "Annotations" / "000001.xml"
    text = file.read_text()
    file.write_text(text[: text.index("<object>")] + "</annotation>")
    image = read_annotations(devkit, "2007", "train")[0]
    assert image.boxes.shape == (0, 4) and image.labels.shape == (0,) and image.difficult.dtype == torch.bool


def test_boxes_are_from_pixel_edge_to_pixel_edge(devkit):
    for side, value in (("xmin", 1), ("ymin", 1), ("xmax", 160), ("ymax", 128)):
        change(devkit, first_side(devkit, side), f"<{side}>{value}</{side}>")
    assert read_annotations(devkit, "2007", "train")[0].boxes[0].tolist() == [0, 0, 160, 128]
    # a box that counts from 0 is off by one, and taken
    change(devkit, "<xmin>1</xmin>", "<xmin>0</xmin>")
    assert read_annotations(devkit, "2007", "train")[0].boxes[0].tolist() == [0, 0, 160, 128]


def test_what_real_annotations_have_besides(devkit):
    """VOC's parts of persons, its fractional corners, and annotations that say nothing of difficulty."""
    expected = read_annotations(devkit, "2007", "train")[0]
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    change(devkit, "</object>", f"{part}</object>")
    change(devkit, "<difficult>0</difficult>", "")
    left = first_side(devkit, "xmin")
    change(devkit, left, left.replace("</", ".25</"))
    image = read_annotations(devkit, "2007", "train")[0]
    assert torch.equal(image.labels, expected.labels) and not image.difficult[~expected.difficult].any()
    moved = image.boxes - expected.boxes
    assert moved[0, 0] == 0.25 and moved.sum() == 0.25


def test_masks_with_a_palette_are_classes(tmp_path):
    mask = Image.fromarray(np.array([[0, 1, 255], [20, 0, 2]], dtype=np.uint8), mode="P")
    mask.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
    mask.save(tmp_path / "mask.png")
    assert open_mask(tmp_path / "mask.png", 20).tolist() == [[0, 1, 255], [20, 0, 2]]


def test_classes_of_ones_own(devkit):
    change(devkit, "<name>car</name>", "<name>gull</name>", "000002")
    images = read_annotations(devkit, "2007", "train", ("gull", "aeroplane", "car"))
    assert 0 in images[1].labels


def test_pixels_are_as_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees when shown
    Image.new("L", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert pixels_tensor(open_pixels(tmp_path / "turned.jpg")).shape == (3, 10, 20)


def says(message, *names):
    """A pattern of a one-line error with a message and the names of files."""
    return "".join(f"(?=.*{name})" for name in (message, *names))


def test_bad_annotations_are_named(devkit):
    file = change(devkit, first_side(devkit, "xmin"), "<xmin>150</xmin>")
    change(devkit, first_side(devkit, "xmax"), "<xmax>150</xmax>")
    with pytest.raises(ValueError, match=says("is empty", file.name)):
        read_annotations(devkit, "2007", "trainval")
    change(devkit, "<xmin>150</xmin>", "<xmin>140</xmin>")
    change(devkit, "<xmax>150</xmax>", "<xmax>170</xmax>")
    with pytest.raises(ValueError, match=says("outside of the image's 160 x 128 pixels", file.name, "140")):
        read_annotations(devkit, "2007", "trainval")
    change(devkit, "<xmax>170</xmax>", "<xmax>nan</xmax>")
    with pytest.raises(ValueError, match=says("is empty", file.name)):
        read_annotations(devkit, "2007", "trainval")
    change(devkit, "<xmax>nan</xmax>", "<xmax>many</xmax>")
    with pytest.raises(ValueError, match=says("does not read", file.name)):
        read_annotations(devkit, "2007", "trainval")
    change(devkit, "<xmax>many</xmax>", "<xmax>160</xmax>")
    change(devkit, "<width>160</width>", "<width>320</width>")
    with pytest.raises(ValueError, match=says("says 320 x 128 pixels", file.name, "000001.jpg")):
        read_annotations(devkit, "2007", "trainval")
    file.write_text('<?xml version="1.0" encoding="cp-unknown"?><annotation/>')
    with pytest.raises(ValueError, match=says("does not read", file.name)):
        read_annotations(devkit, "2007", "trainval")
    file.write_text("<annotation>")
    with pytest.raises(ValueError, match=says("does not read", file.name)):
        read_annotations(devkit, "2007", "trainval")
    file.unlink()
    with pytest.raises(ValueError, match=says("missing", file.name)):
        read_annotations(devkit, "2007", "trainval")


def test_an_unknown_class_is_named(devkit):
    file = change(devkit, "<name>car</name>", "<name>deer</name>", "000002")
    with pytest.raises(ValueError, match=says("class 'deer'", file.name, "aeroplane, bicycle")):
        read_annotations(devkit, "2007", "trainval")


def test_bad_images_and_masks_are_named(devkit):
    root = devkit / "VOC2007"
    mask = root / "SegmentationClass" / "000001.png"
    Image.fromarray(np.zeros((64, 64), dtype=np.uint8)).save(mask)
    with pytest.raises(ValueError, match=says("64 x 64 pixels, its image of 160 x 128", "000001.png")):
        read_masks(devkit, "2007", "train")
    Image.fromarray(np.full((128, 160), 21, dtype=np.uint8)).save(mask)
    with pytest.raises(ValueError, match=says("has class 21", "000001.png")):
        open_mask(mask, 20)
    Image.new("RGB", (160, 128)).save(mask)
    with pytest.raises(ValueError, match=says("has colours", "000001.png")):
        open_mask(mask, 20)
    mask.unlink()
    with pytest.raises(ValueError, match=says("mask .* is missing", "000001.png")):
        read_masks(devkit, "2007", "train")
    image = root / "JPEGImages" / "000002.jpg"
    image.write_bytes(b"no image")
    with pytest.raises(ValueError, match=says("does not decode", "000002.jpg")):
        read_annotations(devkit, "2007", "train")
    with pytest.raises(ValueError, match=says("does not decode", "000002.jpg")):
        open_pixels(image)
    image.unlink()
    with pytest.raises(ValueError, match=says("image .* is missing", "000002.jpg")):
        read_annotations(devkit, "2007", "train")
    with pytest.raises(ValueError, match=says("20 x 300 pixels", "small.jpg", "under 31")):
        check_large_enough(root / "small.jpg", 20, 300, 31)


def test_what_is_not_there_is_said(devkit, tmp_path):
    with pytest.raises(ValueError, match=r"no PASCAL VOC in .*nowhere"):
        read_annotations(tmp_path / "nowhere", "2007", "test")
    with pytest.raises(ValueError, match="expected VOCdevkit/VOC2012"):
        read_annotations(devkit, "2012", "test")
    with pytest.raises(ValueError, match=r"VOC2011 is not read, .*: take VOC2012"):
        read_annotations(devkit, "2011", "test")
    with pytest.raises(ValueError, match="there are the splits test, train, trainval, val"):
        read_annotations(devkit, "2007", "validation")
    (devkit / "VOC2007" / "ImageSets" / "Main" / "test.txt").write_text("")
    with pytest.raises(ValueError, match=r"test.txt names no images"):
        read_annotations(devkit, "2007", "test")
    names = devkit / "VOC2007" / "ImageSets" / "Main" / "val.txt"
    names.write_text(names.read_text().replace("\n", "\n\n", 1))
    with pytest.raises(ValueError, match=r"val.txt has an empty line"):
        read_annotations(devkit, "2007", "val")


def test_a_damaged_mask_is_called_one(devkit):
    mask = read_masks(devkit, "2007", "train")[0].mask
    mask.write_bytes(b"no png")
    with pytest.raises(ValueError, match=rf"^mask {mask} does not decode"):
        read_masks(devkit, "2007", "train")
