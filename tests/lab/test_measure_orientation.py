"""Which way up photographs are, measured: temperature and threshold on answers that can be worked out by hand."""

import argparse
import dataclasses
import json

import pytest
import torch
from conftest import SAMPLES
from PIL import Image

from rotation_ssl import zoo
from rotation_ssl.orientation.turning import open_picture
from training import datasets
from training.evaluation import orientation
from training.evaluation.orientation import (
    fit_temperature,
    fit_threshold,
    measure_orientation,
    most_confident,
    probabilities,
)
from training.evaluation.subject import load_subject
from training.reporting import manifest, remeasure
from training.reporting.options import source_of
from training.reporting.rows import Row, read_file

CALIBRATION = {"size": 128, "temperature": 1.0, "threshold": 0.6, "sure_threshold": 0.9}
# what undoes each orientation's turn or mirror
BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
PHOTOS = sorted((SAMPLES / "photos").glob("*.jpg"))


@pytest.fixture(scope="module")
def subject():
    return load_subject("rotnet_alexnet.photos")


def says(*pairs):
    """Confidences, and whether the answers are right, of pairs of rotation and confidence."""
    rotation, confidence = zip(*pairs, strict=True)
    return torch.tensor(confidence), torch.tensor(rotation) == 0


def test_the_threshold_is_the_least_confidence_that_is_right_often_enough():
    found = says((0, 0.9), (0, 0.8), (1, 0.7), (0, 0.6), (0, 0.5), (2, 0.4))
    assert fit_threshold(*found, 1.0) == pytest.approx(0.8, abs=2e-6)
    assert fit_threshold(*found, 0.8) == pytest.approx(0.5, abs=2e-6), "four of five"
    assert fit_threshold(*found, 0.5) == pytest.approx(0.4, abs=2e-6)
    assert fit_threshold(*says((0, 0.9), (1, 0.7), (0, 0.7)), 1.0) == pytest.approx(0.9, abs=2e-6), "decided together"
    with pytest.raises(ValueError, match=r"no confidence at which 99\.0% of the decisions are right"):
        fit_threshold(*says((1, 0.9), (0, 0.8)), 0.99)


def test_the_temperature_makes_confidences_true():
    """A network that is three times too sure of answers that are right in three of four cases."""
    logits = [torch.zeros(1, 4, 4) for _ in range(400)]
    for number, each in enumerate(logits):
        each[..., 0 if number % 4 else 1] = 3 * torch.tensor(9.0).log()
    confidence, rotation = probabilities(logits, fit_temperature(logits)).max(1)
    # 0.75 for the answer given leaves 0.25 for the three others
    assert confidence.mean() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(rotation == 0, torch.arange(400) % 4 != 0)


def test_the_most_confident_are_chosen():
    confidence, _ = says((0, 0.3), (1, 0.9), (0, 0.9), (0, 0.5), (2, 0.4))
    chosen = {share: mask.nonzero().flatten().tolist() for share, mask in most_confident(confidence).items()}
    assert list(chosen) == list(range(10, 100, 10))
    assert chosen[20] == [1] and chosen[40] == [1, 2] and chosen[80] == [1, 2, 3, 4]


@pytest.fixture
def few_are_ranked(monkeypatch):
    monkeypatch.setattr(orientation, "RANKED", 1)


def test_of_few_pictures_no_shares_are_reported(subject):
    rows = measure_orientation(subject, PHOTOS, "five", CALIBRATION)
    assert [row.protocol for row in rows if "top" in row.protocol] == [] and len(rows) == 5


@pytest.mark.usefixtures("few_are_ranked")
def test_rows_count_what_is_decided_and_what_is_wrong(subject, tmp_path):
    turned = tmp_path / "turned.jpg"
    with Image.open(PHOTOS[0]) as image:
        image.transpose(Image.Transpose.ROTATE_180).save(turned)
    rows = {row.protocol: row for row in measure_orientation(subject, [*PHOTOS, turned], "five", CALIBRATION)}
    right, decided, wrong, sure, surely_wrong = (row.correct for row in list(rows.values())[:5])
    assert next(iter(rows)) == "orientation"
    assert all(sum(row.counts) == row.correct for row in rows.values())
    assert [row.n for row in rows.values()] == [6] * 5 + [1, 2, 2, 3, 3, 4, 5, 5, 6]
    assert right >= 3 and decided >= sure >= surely_wrong and wrong >= 1, "a picture upside down is decided wrongly"
    assert "temperature 1" in rows["orientation"].settings


@pytest.mark.usefixtures("few_are_ranked")
def test_every_row_by_hand(subject, monkeypatch):
    answers = ((0, 0.95), (0, 0.7), (2, 0.92), (1, 0.65), (0, 0.3), (0, 0.97))
    logits = [torch.full((1, 1, 4), (1 - confidence) / 3).log() for _, confidence in answers]
    for each, (rotation, confidence) in zip(logits, answers, strict=True):
        each[..., rotation] = torch.tensor(confidence).log()
    monkeypatch.setattr(orientation, "picture_logits", lambda *_: logits)
    rows = measure_orientation(subject, PHOTOS[:1] * 6, "six", CALIBRATION)
    assert {row.protocol: (row.correct, row.n) for row in rows} == {
        "orientation": (4, 6),
        "orientation-decided-99": (5, 6),
        "orientation-wrong-99": (2, 6),
        "orientation-decided-99.5": (3, 6),
        "orientation-wrong-99.5": (1, 6),
        # from the most confident on: right, right, wrong, right, wrong, right
        "orientation-top-10": (1, 1),
        "orientation-top-20": (2, 2),
        "orientation-top-30": (2, 2),
        "orientation-top-40": (2, 3),
        "orientation-top-50": (2, 3),
        "orientation-top-60": (3, 4),
        "orientation-top-70": (3, 5),
        "orientation-top-80": (3, 5),
        "orientation-top-90": (4, 6),
    }
    assert [sum(row.counts) for row in rows] == [row.correct for row in rows]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The samples as all four datasets, and a manifest of its own."""
    for name in (*orientation.FITTED_ON, *orientation.MEASURED_ON):
        entry = dataclasses.replace(
            datasets.DATASETS[name],
            counts=(0, len(PHOTOS)),
            files=lambda *_: (PHOTOS, torch.zeros(len(PHOTOS), dtype=torch.int64), ("photo",)),
        )
        monkeypatch.setitem(datasets.DATASETS, name, entry)
    monkeypatch.setattr(zoo, "WEIGHTS_DIR", tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "manifest.json").write_text(manifest.manifest_text(zoo.manifest()))
    return tmp_path


@pytest.mark.usefixtures("few_are_ranked")
def test_the_command_fits_measures_and_what_it_measured_is_measured_again(small, capsys, monkeypatch):
    monkeypatch.setattr(orientation, "fit_threshold", lambda confidence, right, precision: precision - 0.3)
    arguments = ["rotnet_alexnet.photos", "--photos", str(small), "--output", str(small / "out")]
    before = manifest.read_manifest()["rotnet_alexnet.photos"]
    assert orientation.main([*arguments, "--fit", "--size", "160"]) == 0
    assert "Caltech-101 test, 160 pixels: " in capsys.readouterr().out
    entry = manifest.read_manifest()["rotnet_alexnet.photos"]
    assert set(entry["orientation"]) == set(CALIBRATION) and entry["orientation"]["threshold"] == pytest.approx(0.69)
    assert entry["orientation"]["size"] == 160
    assert {**entry, "orientation": 0} == {**before, "orientation": 0}, "nothing else"
    rows = read_file(small / "out" / "rows.jsonl")
    names = {"Imagenette val", "VOC2007 test", "EXIF orientation examples test"}
    assert {row.data for row in rows} == names and len(rows) == 42
    assert all("160 pixels" in row.settings for row in rows)
    monkeypatch.setattr(zoo, "manifest", manifest.read_manifest)
    own = [row for row in rows if row.data == "Imagenette val"]
    pairs = list(remeasure.measure_source(own, remeasure.Source("imagenette", small)))
    assert len(pairs) == 14 and all((old.key, old.counts) == (new.key, new.counts) for old, new in pairs)
    assert json.loads((small / "out" / "report.json").read_text())


def test_photographs_with_every_exif_orientation_are_test_images(tmp_path):
    with pytest.raises(ValueError, match=r"no EXIF orientation examples in .*exif: clone https://github.com/recurser"):
        datasets.list_files("exif", tmp_path, "test")
    row = Row("rotnet_alexnet.photos", "orientation", "", 1.0, "measured", "EXIF orientation examples test")
    args = argparse.Namespace(photos=tmp_path, download=False, proposals=None)
    assert source_of(row, args) is None, "listed as not measured, not refused"
    (tmp_path / "exif").mkdir()
    (tmp_path / "exif" / "README.markdown").touch()
    upright = Image.open(PHOTOS[0])
    for tag in range(9):
        # stored the other way round: from its tag on it is shown upright
        stored = upright.transpose(BACK[tag]) if tag in BACK else upright
        exif = Image.Exif()
        exif[0x0112] = tag
        stored.save(tmp_path / "exif" / f"Portrait_{tag}.png", exif=exif)
        (tmp_path / "exif" / f"Portrait_{tag}.png").rename(tmp_path / "exif" / f"Portrait_{tag}.jpg")
    files, labels, _ = datasets.list_files("exif", tmp_path, "test")
    assert [file.name for file in files] == [f"Portrait_{tag}.jpg" for tag in range(9)] and len(labels) == 9
    source = source_of(row, args)
    assert source is not None and (source.dataset, source.folder) == ("exif", tmp_path)
    shown = [open_picture(file, 128).image for file in files]
    assert len({image.tobytes() for image in shown}) == 1, "all are upright"
    with pytest.raises(ValueError, match="have no training images"):
        datasets.list_files("exif", tmp_path, "train")


def test_what_cannot_be_measured_is_refused(small, capsys, monkeypatch):
    for model, why in (("rotnet_nin.cifar10", "no temperature is known for rotnet_nin.cifar10: give --fit first"),):
        assert orientation.main([model, "--photos", str(small), "--output", str(small / "out")]) == 2
        assert why in capsys.readouterr().err
    output = ["--photos", str(small), "--output", str(small / "out")]
    assert orientation.main(["rotnet_alexnet.photos", *output, "--size", "160"]) == 2
    assert "--size is for --fit" in capsys.readouterr().err
    assert orientation.main(["rotnet_alexnet.photos", *output[:2], "--fit", "--record"]) == 2
    assert "fit them, commit them, then measure with --record" in capsys.readouterr().err
    taken = small / "taken"
    taken.touch()
    fit = ["rotnet_alexnet.photos", "--fit", "--photos", str(small / "none"), "--output", str(taken)]
    assert orientation.main(fit) == 2, "before any photograph is read"
    assert f"{taken / 'rows.jsonl'} cannot be written" in capsys.readouterr().err
    monkeypatch.setitem(
        datasets.DATASETS, "imagenette", dataclasses.replace(datasets.DATASETS["imagenette"], counts=(0, 9))
    )
    assert orientation.main(["rotnet_alexnet.photos", "--photos", str(small), "--output", str(small / "out")]) == 2
    assert "this is not the whole of Imagenette: 0 training and 5 test images" in capsys.readouterr().err
