"""Outliers, measured: the rows, the command, and measuring them again."""

import argparse
import dataclasses
import shutil

import pytest
import torch
from conftest import SAMPLES
from PIL import Image

from training import datasets
from training.evaluation import outliers
from training.evaluation.subject import load_subject
from training.reporting import remeasure
from training.reporting.applications import outliers_table
from training.reporting.options import source_of
from training.reporting.required import REQUIRED
from training.reporting.rows import read_file


@pytest.fixture
def small(small_cifar10, tmp_path, monkeypatch):
    """Some images as CIFAR-10, and the photographs as CIFAR-100."""
    for split in ("train", "test"):
        (tmp_path / "cifar100" / split / "photos").mkdir(parents=True)
        for file in (SAMPLES / "photos").glob("*.jpg"):
            shutil.copy(file, tmp_path / "cifar100" / split / "photos")
        shutil.copytree(tmp_path / "cifar100" / split, tmp_path / "imagenette2-320" / split.replace("test", "val"))
    for folder in (small_cifar10 / "test").iterdir():
        for file in sorted(folder.iterdir())[2:]:
            file.unlink()
    for name, counts in (("cifar10", (40, 20)), ("cifar100", (5, 5)), ("imagenette", (0, 5))):
        monkeypatch.setitem(datasets.DATASETS, name, dataclasses.replace(datasets.DATASETS[name], counts=counts))
    monkeypatch.setattr(outliers, "NEIGHBOURS", 2)
    return small_cifar10, tmp_path / "cifar100"


def test_the_command_and_measuring_again(small, tmp_path, capsys):
    data, cifar100 = small
    arguments = ["rotnet_nin.cifar10", "--data", str(data), "--output", str(tmp_path / "out")]
    assert outliers.main([*arguments, "--cifar100", str(cifar100), "--photos", str(tmp_path)]) == 0
    rows = read_file(tmp_path / "out" / "rows.jsonl")
    names = {"CIFAR-100 test", "Imagenette val", "Gaussian noise", "uniform noise"}
    assert {(r.protocol, r.data) for r in rows if r.protocol != "one-class-knn"} == {
        (f"outliers-{score}{kind}", name) for score in ("rotation", "knn") for kind in ("", "-fpr95") for name in names
    }
    values = {(r.protocol, r.data): r.value for r in rows}
    assert values["outliers-rotation", "uniform noise"] > 0.9 and values["outliers-knn", "uniform noise"] > 0.9
    assert all((r.layer == ("block2" if "knn" in r.protocol else "") and "CIFAR-10 test" in r.settings) or
               r.protocol == "one-class-knn" for r in rows)  # fmt: skip
    source = remeasure.Source("cifar10", data, cifar100=cifar100, photos=tmp_path)
    pairs = list(remeasure.measure_source(rows, source))
    assert len(pairs) == len(rows) == 17 and all(abs(old.value - new.value) < 1e-6 for old, new in pairs)
    table = outliers_table(rows)
    assert table.startswith(
        "| normal images | outliers | rotation, AUROC | rotation, FPR at 95 % | k-NN, AUROC | k-NN, FPR at 95 % |"
    )
    assert len(table.splitlines()) == 6
    assert outliers.main([*arguments, "--cifar100", str(tmp_path)]) == 2
    told = f"error: data folder {tmp_path}/test does not exist; give one that holds a folder of images for each class"
    assert capsys.readouterr().err.splitlines()[-1] == told
    for normal, option in (("cifar10", "cifar100"), ("miniplaces", "photos")):
        assert outliers.main([*arguments, "--normal", normal]) == 2
        assert f"the outliers of {normal} are missing: give --{option} DIR" in capsys.readouterr().err
    # the card has them among scenes
    other = ["rotnet_alexnet.photos", "--normal", "cifar10", "--cifar100", str(cifar100), "--record"]
    assert outliers.main(other) == 2
    assert "leave out what changes them" in capsys.readouterr().err


def test_scenes_are_normal_to_a_network_of_photographs(small, tmp_path, monkeypatch):
    photos = sorted((SAMPLES / "photos").glob("*.jpg"))
    # of one colour each: they look like no photograph
    for number, file in enumerate(sorted((tmp_path / "imagenette2-320" / "val" / "photos").iterdir())):
        Image.new("RGB", (64, 48), (60 * number, 200, 0)).save(file)
    places = tmp_path / "miniplaces" / "data"
    for split in ("train", "val"):
        names = [f"{split}/{letter}/{file.name}" for letter in "ab" for file in photos]
        for name in names:
            (places / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(SAMPLES / "photos" / name.rpartition("/")[2], places / "images" / name)
        (places / f"{split}.txt").write_text("".join(f"{name} {number // 5}\n" for number, name in enumerate(names)))
    (tmp_path / "caltech101" / "101_ObjectCategories").mkdir(parents=True)
    shutil.copy(photos[0], tmp_path / "caltech101" / "101_ObjectCategories")
    (tmp_path / "caltech101" / "test.txt").write_text(f"{photos[0].name}\n")
    for name, counts in (("miniplaces", (10, 10)), ("caltech101", (0, 1))):
        monkeypatch.setitem(datasets.DATASETS, name, dataclasses.replace(datasets.DATASETS[name], counts=counts))
    arguments = ["rotnet_alexnet.photos", "--photos", str(tmp_path)]
    assert outliers.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    rows = read_file(tmp_path / "out" / "rows.jsonl")
    wanted = [required for required in REQUIRED["rotnet_alexnet.photos"] if "outliers" in required.protocol]
    assert {(r.protocol, r.data) for r in rows} == {
        *((required.protocol, required.data) for required in wanted), ("one-class-knn", "MiniPlaces val")
    }  # fmt: skip
    assert all("MiniPlaces val" in f"{r.settings} {r.data}" for r in rows)
    values = {(r.protocol, r.data): r.value for r in rows}
    assert values["outliers-knn", "Imagenette val"] == values["outliers-knn", "uniform noise"] == 1
    assert values["outliers-knn", "Caltech-101 test"] < 1, "a copy of a normal one"
    args = argparse.Namespace(data=tmp_path, cifar100=None, photos=tmp_path, download=False)
    (source,) = {source_of(row, args) for row in rows}
    assert source is not None and (source.dataset, source.folder) == ("miniplaces", tmp_path)
    pairs = list(remeasure.measure_source(rows, source))
    assert len(pairs) == len(rows) == 17 and all(abs(old.value - new.value) < 1e-6 for old, new in pairs)


class Reading:
    """A detector whose scores are the features that it is given."""

    def __init__(self, *args):
        pass

    def fit_features(self, features):
        return self

    def predict_features(self, features):
        return features


def test_both_numbers_of_both_scores_by_hand(monkeypatch):
    normal = torch.arange(1, 21, dtype=torch.uint8)
    normal = outliers.LabelledImages(normal.view(20, 1, 1, 1), torch.zeros(20, dtype=torch.int64), ("a",))
    others = torch.tensor([0, 19, 20, 30], dtype=torch.uint8).view(4, 1, 1, 1)
    monkeypatch.setattr(outliers, "RotationOutlierDetector", Reading)
    monkeypatch.setattr(outliers, "_surprise", lambda subject, detector, images: images.flatten().float())
    monkeypatch.setattr(outliers, "_features", lambda subject, images, layer: 255 - images.flatten().float())
    monkeypatch.setattr(outliers, "noise", lambda shape: {})
    monkeypatch.setattr(outliers, "one_class", lambda *args: 0.5)
    subject = load_subject("rotnet_nin.cifar10")
    rows = list(
        outliers.measure_outliers(subject, outliers.LabelledSplits("a", normal, normal), {"b": others}, "block2")
    )
    assert {row.protocol: row.value for row in rows} == {
        # 0 is above none of 1 to 20, 19 above 18 and level with one, 20 above 19 and level with one, 30 above all
        "outliers-rotation": pytest.approx((0 + 18.5 + 19.5 + 20) / 80),
        # 19 of 20 normal images are 19 or less, and so are 0 and 19
        "outliers-rotation-fpr95": 2 / 4,
        # the other way round: the normal ones are 235 to 254, and these are 255, 236, 235, 225
        "outliers-knn": pytest.approx((20 + 1.5 + 0.5 + 0) / 80),
        "outliers-knn-fpr95": 3 / 4,
        "one-class-knn": 0.5,
    }


def test_one_class_is_the_mean_over_classes():
    """Features that tell two classes apart, and two others not at all."""
    model = load_subject("rotnet_nin.cifar10").backbone
    labels = torch.arange(4).repeat(30)
    features = torch.eye(3)[torch.tensor([0, 1, 2, 2])[labels]]
    split = features, outliers.LabelledImages(torch.zeros(120, 3, 1, 1), labels, tuple("abcd"))
    # the first two are told from all, the others from two of three and by a tie from the third
    assert outliers.one_class(model, "block2", split, split) == pytest.approx((1 + 1 + 2 * (2 + 0.5) / 3) / 4)


def test_noise_is_always_the_same_and_of_its_kind():
    first, second = (outliers.noise((50, 3, 8, 8)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["Gaussian noise"].float().std() == pytest.approx(64, abs=3)
    assert first["uniform noise"].float().std() == pytest.approx(73.9, abs=2)
