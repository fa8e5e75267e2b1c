"""Segmentation on a small VOCdevkit: cells lie over their pixels, what is 255 does not count, and chance is beaten."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_voc import write_small_voc
from torch.nn import functional as F

from training.evaluation.subject import load_subject
from training.reporting.rows import read_file
from training.transfer import segmentation as segment
from training.transfer.data import CLASSES, open_mask, open_pixels, read_masks
from training.transfer.metrics import confusion_matrix, intersections_over_unions, mean_over_classes
from training.transfer.network import transfer_network
from training.transfer.pictures import draw_segmentation, palette
from training.transfer.recipes import VOC_SEGMENTATION


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return write_small_voc(tmp_path_factory.mktemp("voc"), train=6, test=3)


def run(*arguments):
    return segment.main([str(argument) for argument in (*arguments, "--workers", 0)])


def fcn(fc_size, classes=20):
    subject = load_subject("rotnet_alexnet", random=True, size=96)
    return segment.Fcn(transfer_network(subject, classes, [], fc_size, scaled=False), classes, 0.0).eval()


@pytest.mark.parametrize("fc_size", [0, 16])
def test_the_command_end_to_end(fc_size, devkit, tmp_path):
    arguments = ["rotnet_alexnet", "--random", "--data", devkit, "--output", tmp_path, "--fc-size", fc_size]
    splits = ["--year", 2007, "--train", "trainval", "--test", "test"]
    assert run(*arguments, *splits, "--steps", 2, "--images-per-step", 2, "--pictures", 2) == 0
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [file.name for file in pictures] == ["000007.png", "000008.png"]
    assert open_pixels(pictures[0]).size == (160, 128)
    (row,) = read_file(tmp_path / "rows.jsonl")
    assert (row.protocol, row.data, row.n) == ("voc-segmentation", "VOC2007 test", None)
    assert 0 <= row.value <= 1 and row.settings.startswith(
        "FCN, 3 classes with the background, trained on trainval, 2 steps"
    )
    assert load_file(tmp_path / "network.safetensors")["score.weight"].shape == (21, fc_size or 256, 1, 1)


@pytest.mark.parametrize("fc_size", [0, 16])
def test_every_pixel_gets_its_scores(fc_size):
    """Sizes that the stride does not divide; and a cell is moved by the pixels that it lies over."""
    network = fcn(fc_size)
    torch.nn.init.normal_(network.score.weight)
    with torch.inference_mode():
        for height, width in ((64, 96), (70, 33), (33, 128)):
            assert network(torch.zeros(1, 3, height, width, dtype=torch.uint8)).shape == (1, 21, height, width)
        cells = network.maps(F.pad(torch.zeros(1, 3, 128, 160), [network.padding] * 4))
    assert cells.shape[-2:] == (128 // network.stride, 160 // network.stride)
    side = 12 * 32
    image = torch.zeros(1, 3, side, side, requires_grad=True)
    padded = F.pad(image, [network.padding] * 4)
    row, column = 6 * 32 // network.stride, 5 * 32 // network.stride
    network.maps(padded + 0.1 * torch.randn_like(padded))[0, :, row, column].sum().backward()
    reach = image.grad.abs().sum((0, 1))
    places = torch.arange(side) + 0.5
    middle = torch.stack([(reach.sum(1) * places).sum(), (reach.sum(0) * places).sum()]) / reach.sum()
    expected = torch.tensor([6 * 32.0, 5 * 32.0]) + network.stride / 2
    assert (middle - expected).abs().max() < 6, "a padding that is off by 8 pixels is seen"


def test_fc_layers_as_convolutions_compute_the_same():
    subject = load_subject("rotnet_alexnet", random=True, size=96)
    network = transfer_network(subject, 20, [], 16, scaled=False)
    maps = torch.randn(2, 256, 6, 6)
    with torch.no_grad():
        expected = network.head.fc7(network.head.fc6(maps.flatten(1)))
        found = segment.Fcn(network, 20, 0.5).eval().maps[1:](maps).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_count_has_no_loss():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    masks = torch.tensor([[[0, 255], [2, 255]]], dtype=torch.uint8)
    loss = segment.pixel_loss(logits, masks)
    expected = -(logits.log_softmax(1)[0, 0, 0, 0] + logits.log_softmax(1)[0, 2, 1, 0]) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (logits.grad[..., 1] == 0).all()
    nothing = segment.pixel_loss(logits, torch.full((1, 2, 2), 255, dtype=torch.uint8))
    assert nothing == 0


def test_images_of_different_sizes_make_a_batch():
    samples = [(torch.ones(3, 4, 6, dtype=torch.uint8), torch.zeros(4, 6, dtype=torch.uint8)),
               (torch.ones(3, 5, 2, dtype=torch.uint8), torch.ones(5, 2, dtype=torch.uint8))]  # fmt: skip
    pixels, masks = segment.together(samples, (0.5, 0.2, 0.0))
    assert pixels.shape == (2, 3, 5, 6) and masks.shape == (2, 5, 6)
    assert (masks[0, :4] == 0).all() and (masks[0, 4] == 255).all() and (masks[1, :, 2:] == 255).all()
    assert pixels[0, :, 4, 0].tolist() == [128, 51, 0] and (pixels[1, :, :, :2] == 1).all()


def test_image_and_mask_are_mirrored_together(devkit):
    images = read_masks(devkit, "2007", "train")
    plain, mask = segment._test_sample(20, None, images[0])
    seen = set()
    for seed in range(8):
        pixels, own = segment._training_sample(20, None, images[0], random.Random(seed))
        mirrored = torch.equal(pixels, plain.flip(-1)) and torch.equal(own, mask.flip(-1))
        assert mirrored or (torch.equal(pixels, plain) and torch.equal(own, mask))
        seen.add(mirrored)
    assert seen == {True, False}


def test_scaled_images_are_judged_on_every_pixel(devkit):
    """Training sees image and mask at the smaller size, the test counts the pixels of the stored mask."""
    images = read_masks(devkit, "2007", "train")
    pixels, mask = segment._training_sample(20, 80, images[0], random.Random(0))
    assert pixels.shape == (3, 64, 80) and mask.shape == (64, 80)
    stored = open_mask(images[0].mask, 20)
    assert set(mask.unique().tolist()) <= set(stored.unique().tolist()), "no classes in between"
    recipe = dataclasses.replace(VOC_SEGMENTATION, longest=80)
    confusion = segment.segment(recipe, fcn(16), images)
    assert confusion.sum() == sum(int((open_mask(image.mask, 20) != 255).sum()) for image in images)
    assert segment.scaled_size(80, 40, 100) == segment.scaled_size(80, 40, None) == (80, 40)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_say_the_precision(precision, devkit, tmp_path):
    arguments = ["rotnet_alexnet", "--random", "--data", devkit, "--output", tmp_path, "--fc-size", 0]
    options = ["--budget", "cpu", "--steps", 2, "--images-per-step", 2, "--precision", precision, "--longest", 64]
    assert run(*arguments, *options) == 0
    (row,) = read_file(tmp_path / "rows.jsonl")
    assert row.settings.endswith(f", {precision}") and "longer side 64 pixels" in row.settings and row.budget == ""


def test_pictures_have_the_colours_of_voc(devkit, tmp_path):
    assert palette(20)[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)] and palette(20)[20] == (0, 64, 128)
    image = read_masks(devkit, "2007", "train")[0]
    predicted = torch.zeros(128, 160, dtype=torch.int64)
    predicted[:, 80:] = 1
    before = torch.from_numpy(np.array(Image.open(image.file))).float()
    after = torch.from_numpy(np.array(Image.open(draw_segmentation(tmp_path, image.file, predicted, 20)))).float()
    assert torch.equal(after[:, :80], before[:, :80])
    expected = 0.4 * before[:, 80:] + 0.6 * torch.tensor([128.0, 0, 0])
    assert (after[:, 80:] - expected).abs().max() <= 1


def test_other_networks_segment_too(devkit):
    subject = load_subject("resnet18", random=True, size=64)
    network = transfer_network(subject, 20, [], scaled=False)
    images = read_masks(devkit, "2007", "train")
    training = dataclasses.replace(VOC_SEGMENTATION.training, steps=1, images_per_step=2)
    recipe = dataclasses.replace(VOC_SEGMENTATION, training=training)
    trained, values = segment.measure_segmentation(recipe, network, images, images, 20)
    assert trained.stride == 32 and len(values) == 21


@pytest.mark.slow
@pytest.mark.parametrize("fc_size", [0, 64])
def test_it_learns(fc_size, tmp_path):
    """An object of two classes in each image. Chance calls every pixel background."""
    classes = ("aeroplane", "horse")
    devkit = write_small_voc(tmp_path, train=40, test=20, classes=classes, objects=(1, 1), sides=(88, 120))
    train, test = (read_masks(devkit, "2007", split) for split in ("trainval", "test"))
    chance = torch.zeros(21, 21, dtype=torch.int64)
    for image in test:
        mask = open_mask(image.mask, len(CLASSES))
        chance += confusion_matrix(torch.zeros_like(mask), mask, 21)
    chance = mean_over_classes(intersections_over_unions(chance))
    assert chance < 0.25
    subject = load_subject("rotnet_alexnet", random=True, size=96)
    network = transfer_network(subject, 20, [image.file for image in train], fc_size)
    # cells of 16 pixels learn such small images sooner than cells of 32
    steps, images, lr = (60, 4, 0.03) if fc_size == 0 else (90, 2, 0.01)
    training = dataclasses.replace(VOC_SEGMENTATION.training, steps=steps, lr=lr, images_per_step=images)
    recipe = dataclasses.replace(VOC_SEGMENTATION, training=training, dropout=0.0)
    _, values = segment.measure_segmentation(recipe, network, train, test, 20)
    assert mean_over_classes(values) > chance + (0.2 if fc_size == 0 else 0.1), (chance, values)


def test_bad_input_is_a_one_line_error(devkit, capsys, tmp_path):
    start = ["rotnet_alexnet", "--random", "--data", devkit, "--fc-size", 16, "--steps", 1]
    splits = ["--year", 2007, "--train", "trainval", "--test", "test"]
    root = devkit / "VOC2007"

    def refused(*arguments):
        assert run(*start, "--output", tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and not (tmp_path / "out").exists()
        return error

    assert "expected VOCdevkit/VOC2012" in refused()
    assert "has class" in refused(*splits, "--classes", "aeroplane", "bicycle", "--images-per-step", 6)
    small = root / "JPEGImages" / "000009.jpg"
    Image.new("RGB", (160, 20)).save(small)
    assert f"{root / 'SegmentationClass' / '000009.png'} is of 160 x 128 pixels" in refused(*splits)
    Image.new("L", (160, 20)).save(root / "SegmentationClass" / "000009.png")
    assert f"image {small} is of 160 x 20 pixels: the network's strides" in refused(*splits)
    (root / "SegmentationClass" / "000009.png").unlink()
    assert "000009.png is missing" in refused(*splits)
