"""Images are decoded once, and again only where they changed; a damaged one is named."""

import os

import pytest
import torch
from small_voc import write_small_voc

from training.transfer import checking
from training.transfer.data import read_masks


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "FEW", 1)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    return read_masks(write_small_voc(tmp_path, train=4, test=2), "2007", "trainval")


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded."""
    names = []
    for name in ("open_pixels", "open_mask"):
        read = getattr(checking, name)
        monkeypatch.setattr(
            checking, name, lambda file, read=read, **options: names.append(file.name) or read(file, **options)
        )
    return names


def test_what_was_decoded_is_not_decoded_again(images, decoded):
    files = [image.file for image in images]
    checking.check_images(files[:3])
    assert decoded == [file.name for file in files[:3]]
    checking.check_images(files)
    assert decoded[3:] == [files[3].name]
    checking.check_images(files)
    assert len(decoded) == 4
    # one that was changed since
    os.utime(files[1], ns=(0, 0))
    checking.check_images(files)
    assert decoded[4:] == [files[1].name]
    # masks are of so many classes
    masks = [image.mask for image in images]
    for classes, more in ((20, 4), (20, 0), (21, 4)):
        before = len(decoded)
        checking.check_masks(masks, classes)
        assert len(decoded) - before == more


def test_a_damaged_image_is_named_and_not_recorded(images, decoded):
    files = [image.file for image in images]
    whole = files[2].read_bytes()
    files[2].write_bytes(whole[:1000])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"image {files[2]} does not decode"):
            checking.check_images(files)
    files[2].write_bytes(whole)
    checking.check_images(files)
    assert decoded[-4:] == [file.name for file in files]


def test_a_damaged_record_is_no_record(images, decoded):
    files = [image.file for image in images]
    checking.check_images(files)
    record = checking.record_file(files[0].parent)
    for content in (record.read_bytes()[:-20], b"[]"):
        record.write_bytes(content)
        decoded.clear()
        checking.check_images(files)
        assert len(decoded) == 4


def test_few_images_leave_no_record(images, decoded, monkeypatch):
    monkeypatch.setattr(checking, "FEW", 500)
    files = [image.file for image in images]
    checking.check_images(files)
    checking.check_images(files)
    assert len(decoded) == 8 and not checking.record_file(files[0].parent).exists()
