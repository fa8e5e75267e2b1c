"""Every figure is drawn, is not blank, says what it was drawn from, and shows the rows that it should."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from conftest import SAMPLES
from PIL import Image
from torch import nn

from rotation_ssl.images import read_images
from training.protocols import PROTOCOLS
from training.reporting import figures, pictures
from training.reporting.rows import Row

NAME, RANDOM, PAPER = "rotnet_nin.cifar10", "rotnet_nin.random", "rotnet_nin.paper"
FEW = "few-labels"
STAMP = "0123456789abcdef" * 4


def probe(weights, layer, value, protocol="linear", source="measured", budget=None, **more):
    if budget is None:
        budget = "" if "" in PROTOCOLS[protocol].recipes else "cached"
    return Row(weights, protocol, layer, value, source, "CIFAR-10 test", budget, **more)


def few(weights, labels, value, protocol=FEW, source="measured", **more):
    return probe(weights, "block2", value, protocol, source, labels_per_class=labels, **more)


LAYER_ROWS = [
    *(probe(NAME, f"block{i}", v, "knn") for i, v in enumerate((0.53, 0.62, 0.61, 0.47), 1)),
    *(probe(NAME, f"block{i}", v) for i, v in enumerate((0.74, 0.79, 0.77, 0.69), 1)),
    *(probe(NAME, "block2", v, "nonlinear", budget="cached", seed=s) for s, v in enumerate((0.86, 0.87, 0.88))),
    probe(NAME, "block2", 0.9, "conv", budget="paper", seed=0),
    *(probe(RANDOM, f"block{i}", v, seed=0) for i, v in enumerate((0.6, 0.58), 1)),
    probe(RANDOM, "block1", 0.62, seed=1),
    *(probe(PAPER, f"block{i}", v, "nonlinear", "paper, table 1") for i, v in enumerate((0.85, 0.89), 1)),
    probe(PAPER, "block2", 0.9116, "conv", "paper, table 3"),
]
OTHER_ROWS = [
    probe("rotnet_nin.other", "block1", 0.7),
    probe("rotnet_nin@0123456789ab", "block1", 0.7),
    probe("rotnet_nin5.random", "block1", 0.6, seed=0),
    probe("rotnet_nin5.paper", "block1", 0.8504, "nonlinear", "paper, table 1"),
    probe(PAPER, "block1", 0.8465, "nonlinear", "others' run of the authors' code"),
    probe(NAME, "block1", 0.7, source="paper, table 9"),
    probe(NAME, "", 0.87, "rotation"),
    dataclasses.replace(probe(NAME, "block1", 0.7), data="CIFAR-100 test"),
    probe(NAME, "block1", 0.7, labels_per_class=100, draw="first", seed=0),
]
FEW_ROWS = [
    *(few(NAME, k, v, seed=s, draw="first") for k, v in ((20, 0.55), (400, 0.77)) for s in (0, 1)),
    few(NAME, 20, 0.5, seed=0, draw="seed 1"),
    *(few(RANDOM, k, v, "supervised", seed=0, draw="first") for k, v in ((20, 0.33), (400, 0.71), (5000, 0.9))),
    *(few(PAPER, k, v, source="an independent port") for k, v in ((20, 0.617), (400, 0.789))),
    few(PAPER, 20, 0.334, "supervised", "an independent port"),
]
OTHER_FEW_ROWS = [
    few("rotnet_nin.other", 20, 0.5, seed=0),
    few(RANDOM, 20, 0.4, seed=0),
    few(NAME, 20, 0.4, "supervised", seed=0),
    few("rotnet_nin5.paper", 20, 0.6, source="an independent port"),
    probe(NAME, "block2", 0.9, FEW),
    probe(RANDOM, "", 0.92, "supervised", seed=0),
    dataclasses.replace(few(NAME, 20, 0.5, seed=0), data="CIFAR-100 test"),
]


@pytest.fixture(scope="module")
def backbone():
    return timm.create_model("rotnet_nin", pretrained=True)


@pytest.fixture(scope="module")
def images():
    return read_images(sorted((SAMPLES / "cifar10").glob("*.png")), 32)


def pixels(file, inches_high):
    """The picture (H, W, 3), once it is known to be a sound png of card size that shows something."""
    assert file.stat().st_size < 300_000
    with Image.open(file) as image:
        assert image.format == "PNG"
        picture = np.asarray(image.convert("RGB"))
    assert 740 <= picture.shape[1] <= 980
    assert inches_high[0] * 120 <= picture.shape[0] <= inches_high[1] * 120
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert not list(file.parent.glob("*.tmp"))
    return picture


def shows(picture, color):
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(picture.astype(int) - wanted).sum(2) < 6).any())


def test_mean_and_deviation_of_hand_worked_values():
    rows = [
        probe(NAME, "block2", 0.5, seed=0),
        probe(NAME, "block1", 0.25, seed=0),
        probe(NAME, "block2", 0.7, seed=1),
        probe(NAME, "block2", 0.9, seed=2),
    ]
    # mean (5 + 7 + 9) / 3 = 7, squared distances 4 + 0 + 4, over n - 1 = 2: variance 4, in tenths
    (one, three) = figures.curve_points(rows, lambda row: int(row.layer[-1]))
    assert one == (1, 0.25, None)
    assert three[0] == 2
    assert three[1:] == pytest.approx((0.7, 0.2))


def test_draws_of_few_labels_are_averaged_too():
    points = figures.curve_points([row for row in FEW_ROWS if row.weights == NAME], lambda row: row.labels_per_class)
    assert [at for at, _, _ in points] == [20, 400]
    assert points[0][1] == pytest.approx((0.55 + 0.55 + 0.5) / 3)


def test_rows_by_layer_are_those_of_the_weights_random_and_the_paper():
    mixed = OTHER_ROWS + LAYER_ROWS[::-1] + FEW_ROWS
    assert set(map(id, figures.rows_by_layer(mixed, NAME))) == set(map(id, LAYER_ROWS))


def test_rows_by_layer_are_none_without_a_measured_one():
    assert figures.rows_by_layer([row for row in LAYER_ROWS if row.weights != NAME], NAME) == []


def test_rows_of_few_labels_are_those_of_the_weights_supervised_and_quoted():
    mixed = OTHER_FEW_ROWS + FEW_ROWS[::-1] + LAYER_ROWS
    assert set(map(id, figures.rows_few_labels(mixed, NAME))) == set(map(id, FEW_ROWS))
    assert figures.rows_few_labels([row for row in mixed if row.weights != NAME], NAME) == []


def test_stamp_of_rows_is_of_their_content_in_any_order():
    stamp = figures.rows_stamp(LAYER_ROWS)
    assert len(stamp) == 64
    assert figures.rows_stamp(LAYER_ROWS[::-1]) == stamp
    assert figures.rows_stamp(LAYER_ROWS[1:]) != stamp
    assert figures.rows_stamp([dataclasses.replace(LAYER_ROWS[0], value=0.54), *LAYER_ROWS[1:]]) != stamp


def test_accuracy_by_layer_is_drawn_from_just_its_rows(tmp_path):
    file = tmp_path / "layers.png"
    figures.draw_accuracy_by_layer(figures.rows_by_layer(LAYER_ROWS + OTHER_ROWS, NAME), NAME, file)
    picture = pixels(file, (3, 6))
    assert all(shows(picture, PROTOCOLS[id].color) for id in ("knn", "linear", "nonlinear", "conv"))
    assert figures.stamp_of(file) == figures.rows_stamp(LAYER_ROWS)
    figures.draw_accuracy_by_layer([dataclasses.replace(LAYER_ROWS[0], value=0.1), *LAYER_ROWS[1:]], NAME, file)
    assert figures.stamp_of(file) != figures.rows_stamp(LAYER_ROWS)
    assert (pixels(file, (3, 6)) != picture).any()


def test_accuracy_by_layer_of_a_single_row(tmp_path):
    figures.draw_accuracy_by_layer([probe(NAME, "block1", 0.5)], NAME, tmp_path / "layers.png")
    pixels(tmp_path / "layers.png", (3, 6))


def test_few_labels_are_drawn_from_just_their_rows(tmp_path):
    file = tmp_path / "few.png"
    figures.draw_few_labels(figures.rows_few_labels(FEW_ROWS + OTHER_FEW_ROWS, NAME), NAME, file)
    picture = pixels(file, (3, 6))
    assert all(shows(picture, PROTOCOLS[id].color) for id in ("few-labels", "supervised"))
    assert figures.stamp_of(file) == figures.rows_stamp(FEW_ROWS)


def test_filters_are_tiles_around_grey(tmp_path, backbone):
    file = tmp_path / "filters.png"
    pictures.draw_filters(backbone, file, STAMP)
    picture = pixels(file, (1, 4))
    assert figures.stamp_of(file) == STAMP
    # 192 filters, 24 a line: tiles of 5 x 5 squares of 7 pixels between gaps of 5
    assert picture.shape == (8 * 40 + 5, 24 * 40 + 5, 3)
    weight = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d)).weight.detach()
    for index, (row, column) in ((0, (0, 0)), (25, (1, 1)), (191, (7, 23))):
        tile = picture[row * 40 + 5 : row * 40 + 40, column * 40 + 5 : column * 40 + 40][3::7, 3::7]
        wanted = 127.5 + 127.5 * weight[index] / weight[index].abs().max()
        assert np.abs(tile - wanted.permute(1, 2, 0).numpy()).max() < 1.5


def test_filters_need_a_convolution_of_colours(tmp_path):
    with pytest.raises(ValueError, match="three channels"):
        pictures.draw_filters(nn.Sequential(nn.Conv2d(1, 4, 3)), tmp_path / "filters.png", STAMP)


def test_attention_shows_each_image_and_three_maps(tmp_path, backbone, images):
    file = tmp_path / "attention.png"
    pictures.draw_attention(backbone, images[::5], file, STAMP)
    picture = pixels(file, (2, 5))
    assert figures.stamp_of(file) == STAMP
    # the first image below the titles, three pixels to one
    shown = picture[26 : 26 + 96 : 3, 8 : 8 + 96 : 3]
    assert np.abs(shown.astype(int) - images[0].permute(1, 2, 0).numpy()).max() <= 1
    maps = [picture[26 : 26 + 96, x : x + 96] for x in (112, 216, 320)]
    assert all(part.max() > 200 and part.std() > 20 for part in maps)


@pytest.mark.parametrize("name", ["rotnet_alexnet", "resnet18"])
def test_attention_and_filters_of_other_backbones(tmp_path, name):
    model = timm.create_model(name)
    larger = torch.randint(0, 256, (2, 3, 80, 80), dtype=torch.uint8)
    pictures.draw_attention(model, larger, tmp_path / "attention.png", STAMP)
    pixels(tmp_path / "attention.png", (0.5, 2))
    pictures.draw_filters(model, tmp_path / "filters.png", STAMP)
    pixels(tmp_path / "filters.png", (0.5, 4))


def test_nearest_is_the_noisy_copy_and_never_the_copy_itself(backbone, images):
    queries = images[[3, 17]]
    noise = torch.randint(-3, 4, queries.shape)
    noisy = (queries.long() + noise).clamp(0, 255).to(torch.uint8)
    gallery = torch.cat([images, noisy, queries[:1]])
    indices, similarities = pictures.nearest(backbone, "block2", gallery, queries, count=5)
    assert indices.shape == similarities.shape == (2, 5)
    assert indices[:, 0].tolist() == [40, 41]
    assert not {3, 42} & set(indices[0].tolist())
    assert 17 not in indices[1].tolist()
    assert (similarities.diff(dim=1) <= 0).all()
    assert ((similarities <= 1 + 1e-6) & (similarities >= -1)).all()


def test_nearest_is_by_cosine_similarity(backbone, images):
    indices, similarities = pictures.nearest(backbone, "block1", images[1:], images[:1], count=39)
    maps = pictures._features(backbone, images, ["block1"], maps=True)["block1"]
    pooled = maps.mean((2, 3))
    wanted = torch.cosine_similarity(pooled[:1], pooled[1:])
    assert torch.allclose(similarities[0], wanted[indices[0]], atol=1e-5)
    assert sorted(indices[0].tolist()) == list(range(39))


def test_nearest_says_what_is_wrong(backbone, images):
    with pytest.raises(ValueError, match="1 to 39"):
        pictures.nearest(backbone, "block2", images, images[:1], count=40)
    with pytest.raises(ValueError, match="1 to 40"):
        pictures.nearest(backbone, "block2", images, 255 - images[:1], count=0)
    with pytest.raises(ValueError, match="block9"):
        pictures.nearest(backbone, "block9", images, images[:1])


def test_neighbours_are_drawn_beside_their_query(tmp_path, backbone, images):
    file = tmp_path / "neighbours.png"
    pictures.draw_neighbours(backbone, "block2", images, images[::4], file, STAMP)
    picture = pixels(file, (8, 11))
    assert figures.stamp_of(file) == STAMP
    indices, _ = pictures.nearest(backbone, "block2", images, images[::4])
    for line, query in ((0, 0), (9, 36)):
        top = line * 122 + 26
        for left, wanted in ((8, images[query]), (128, images[indices[line, 0]])):
            shown = picture[top : top + 96 : 3, left : left + 96 : 3]
            assert np.abs(shown.astype(int) - wanted.permute(1, 2, 0).numpy()).max() <= 1


def test_drawing_leaves_the_backbone_as_it_was(tmp_path, backbone, images):
    backbone.train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    pictures.draw_attention(backbone, images[:1], tmp_path / "attention.png", STAMP)
    pictures.draw_filters(backbone, tmp_path / "filters.png", STAMP)
    assert backbone.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_a_figure_without_a_stamp_is_refused(tmp_path):
    file = tmp_path / "other.png"
    Image.new("RGB", (4, 4)).save(file)
    with pytest.raises(ValueError, match=r"other\.png does not say what it was drawn from"):
        figures.stamp_of(file)
    file.write_text("no image")
    with pytest.raises(ValueError, match="is not an image"):
        figures.stamp_of(file)
    with pytest.raises(FileNotFoundError):
        figures.stamp_of(tmp_path / "missing.png")
