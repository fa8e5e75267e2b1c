"""Outlier scores: hand-worked values, laws, the interface of pytorch-ood, and images that do not belong."""

import csv
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import SAMPLES
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score
from timm.data import resolve_model_data_config
from torch import nn

import rotation_ssl  # noqa: F401  registers the models with timm
from rotation_ssl import cli
from rotation_ssl.images import normalize, read_images
from rotation_ssl.outliers import RotationOutlierDetector, auroc, false_positive_rate

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def model():
    return timm.create_model("rotnet_nin.cifar10", pretrained=True).eval()


@pytest.fixture(scope="module")
def images(model):
    cfg = resolve_model_data_config(model)
    return normalize(read_images(sorted((SAMPLES / "cifar10").glob("*.png")), 32), cfg["mean"], cfg["std"])


class Says(nn.Module):
    """Gives the logits that it was made with, turn by turn."""

    num_classes = 4

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.repeat_interleave(len(images) // 4, 0)


def test_the_rotation_score_is_the_mean_surprise_at_the_true_turns():
    half = torch.tensor(3.0).log().item()  # 3 : 1 : 1 : 1 is one half
    right = [[half if column == row else 0.0 for column in range(4)] for row in range(4)]
    detector = RotationOutlierDetector(Says(right))
    assert torch.allclose(detector.predict(torch.zeros(2, 3, 8, 8)), torch.tensor(2.0).log().expand(2))
    flat = RotationOutlierDetector(Says([[0.0] * 4] * 4))
    assert torch.allclose(flat.fit([]).predict(torch.zeros(3, 3, 8, 8)), torch.tensor(4.0).log().expand(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_features_that_are_not_finite_are_refused(value):
    detector = RotationOutlierDetector(timm.create_model("rotnet_nin"), "knn", "block2", neighbours=1)
    with pytest.raises(ValueError, match="features are not finite"):
        detector.fit_features(torch.tensor([[1.0, value]], dtype=torch.float64))
    detector.fit_features(torch.ones(1, 2))
    with pytest.raises(ValueError, match="features are not finite"):
        detector.predict_features(torch.tensor([[1.0, value]], dtype=torch.float64))


def test_the_distance_is_to_the_kth_nearest():
    model = timm.create_model("rotnet_nin")
    detector = RotationOutlierDetector(model, "knn", "block2", neighbours=2)
    detector.fit_features(torch.tensor([[1.0, 0], [3.0, 0], [0, 2.0]]))
    found = detector.predict_features(torch.tensor([[5.0, 0], [0, 1.0], [-1.0, 0]]))
    assert torch.allclose(found, torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("score", ["rotation", "knn"])
def test_noise_does_not_belong(model, images, score):
    detector = RotationOutlierDetector(model, score, "block2" if score == "knn" else "", neighbours=1)
    shown = images[::2] if score == "knn" else images
    assert detector.fit([(images[1::2], torch.zeros(len(images[1::2])))]) is detector
    noise = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert auroc(detector.predict(shown), detector.predict(noise)) > 0.9


def test_batches_and_modes_do_not_matter(model, images):
    detector = RotationOutlierDetector(model.train())
    whole = detector.predict(images)
    assert torch.allclose(whole, torch.cat([detector.predict(part) for part in images.split(7)]), atol=1e-5)
    assert not model.training and detector.predict(images[:0]).shape == (0,)


@given(SCORES, SCORES)
def test_auroc_is_scikit_learns(normal, outlying):
    labels = [0] * len(normal) + [1] * len(outlying)
    found = auroc(torch.tensor(normal), torch.tensor(outlying))
    assert found == pytest.approx(roc_auc_score(labels, normal + outlying))
    assert found + auroc(torch.tensor(outlying), torch.tensor(normal)) == pytest.approx(1)


def test_scores_that_are_apart_have_an_auroc_of_exactly_one():
    # float32 cannot hold the sum of 10,000 ranks
    scores = torch.linspace(0, 1, 20_000)
    assert auroc(scores[:10_000], scores[10_000:]) == 1.0


@given(SCORES, SCORES, st.sampled_from([0.5, 0.95, 1.0]))
def test_enough_normal_images_pass(normal, outlying, kept):
    normal, outlying = torch.tensor(normal), torch.tensor(outlying)
    found = false_positive_rate(normal, outlying, kept)
    passing = [t for t in normal if (normal <= t).double().mean() >= kept - 1e-12]
    assert found == pytest.approx(float((outlying <= min(passing)).double().mean()))


def test_false_positives_by_hand():
    normal = torch.arange(1.0, 21.0)  # 19 of 20 are at most 19
    assert false_positive_rate(normal, torch.tensor([18.0, 19.0, 19.5, 30.0])) == 0.5
    # 0.55 * 100 is more than 55 in floating point
    assert false_positive_rate(torch.arange(1.0, 101.0), torch.tensor([55.0, 55.5]), kept=0.55) == 0.5


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda m: RotationOutlierDetector(m, "energy"), "score must be one of rotation, knn, got 'energy'"),
        (lambda m: RotationOutlierDetector(m, "knn"), "needs a layer, one of block1, block2, block3, block4, got ''"),
        (lambda m: RotationOutlierDetector(m, "knn", "block2", 0), "neighbours must be at least 1"),
        (lambda m: RotationOutlierDetector(timm.create_model("test_resnet")), "4 outputs"),
        (lambda m: RotationOutlierDetector(m).fit_features(torch.ones(2, 2)), "has no features"),
        (lambda m: RotationOutlierDetector(m, "knn", "block2").predict_features(torch.ones(2, 2)), "call fit first"),
        (lambda m: RotationOutlierDetector(m, "knn", "block2").fit_features(torch.ones(2, 2)), "at least 10 images"),
        (lambda m: RotationOutlierDetector(m, "knn", "block2").fit([]), "no normal images"),
        (lambda m: RotationOutlierDetector(m).predict(torch.zeros(1, 3, 8, 9)), "must be square"),
        (lambda m: auroc(torch.ones(0), torch.ones(2)), "give finite scores"),
        (lambda m: false_positive_rate(torch.ones(1), torch.ones(2), 0.0), "kept must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused(model, call, why):
    with pytest.raises(ValueError, match=why):
        call(model)


# the command


@pytest.fixture
def folders(tmp_path):
    """The CIFAR-10 samples as normal images; among others of them two that do not belong, and one that is broken."""
    mixed, normal = tmp_path / "mixed", tmp_path / "normal"
    for folder in (mixed, normal):
        folder.mkdir()
    for number, file in enumerate(sorted((SAMPLES / "cifar10").glob("*.png"))):
        shutil.copy(file, (mixed, normal)[number % 2])
    noise = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3)).astype(np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(mixed / f"noise{number}.png")
    return mixed, normal


def outliers(*arguments):
    return cli.main(["outliers", *map(str, arguments), "--model", "rotnet_nin"])


@pytest.mark.parametrize("compared", [False, True])
def test_what_does_not_belong_comes_first(folders, tmp_path, capsys, compared):
    mixed, normal = folders
    more = ["--normal", normal, "--neighbours", "3"] if compared else []
    assert outliers(mixed, "-o", tmp_path / "s.csv", "--sheet", tmp_path / "s.png", *more) == 0
    with (tmp_path / "s.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    scores = [float(row["score"]) for row in rows]
    assert {row["file"] for row in rows[:2]} == {"noise0.png", "noise1.png"} and scores == sorted(scores)[::-1]
    assert len(rows) == len(list(mixed.iterdir()))
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (6 * 160, -(-len(rows) // 6) * 176)
        first = np.asarray(sheet)[2:158, 2:158]
    assert first.std() > 40, "noise is drawn first"
    told = capsys.readouterr().out
    assert ("distance in block2 to 20 normal images" if compared else "by rotation") in told


def test_broken_images_are_named(folders, tmp_path, capsys):
    mixed, normal = folders
    (mixed / "cut.png").write_bytes(b"\x89PNG")
    assert outliers(mixed, "-o", tmp_path / "s.csv", "--normal", normal) == 1
    assert "skipped 1 broken image: " in capsys.readouterr().out
    (normal / "cut.png").write_bytes(b"\x89PNG")
    assert outliers(mixed, "-o", tmp_path / "n.csv", "--normal", normal) == 1
    assert "to 20 normal images" in capsys.readouterr().out
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "cut.png").write_bytes(b"\x89PNG")
    assert outliers(tmp_path / "bad", "-o", tmp_path / "t.csv") == 2
    assert "none of the 1 images can be read" in capsys.readouterr().err and not (tmp_path / "t.csv").exists()


def test_files_that_are_no_images_are_counted(folders, tmp_path, capsys):
    mixed, normal = folders
    for file in (mixed / "a.avif", mixed / "b.AVIF", normal / "notes.txt"):
        file.touch()
    assert outliers(mixed, "-o", tmp_path / "s.csv", "--normal", normal) == 0
    assert capsys.readouterr().out.endswith(f"\nnot read: 2 .avif files\nnot read in {normal}: 1 .txt file\n")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--layer", "block2"], "--layer is for the comparison with normal images: add --normal FOLDER"),
        (
            ["--normal", "normal", "--neighbours", "21"],
            "--neighbours 21 needs as many; give a smaller",
        ),
        (["--neighbours", "3"], "--neighbours is for the comparison with normal images"),
        (["--sheet", "s.csv"], "-o and --sheet are the same file"),
        (["--normal", "nowhere"], "image folder nowhere does not exist"),
        (["--sheet", "there.png"], "there.png exists; give another name, or --force"),
        (["--sheet", "nowhere/s.png"], "cannot be written: nowhere is not a folder"),
        (["--normal", ".", "--layer", "block9"], "got 'block9'"),
        (["--sheet", "s.jpg"], "--sheet s.jpg does not end in .png; give another name"),
        (["-o", "s.parquet"], "-o s.parquet does not end in .csv; give another name"),
        (["--sheet", "s3://bucket/s.png"], "the output must be a local or mounted file, got s3:/bucket/s.png"),
    ],
)
def test_options_that_do_not_fit_are_refused(folders, tmp_path, capsys, monkeypatch, more, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_bytes(b"mine")
    before = set(tmp_path.iterdir())
    assert outliers(folders[0], "-o", tmp_path / "s.csv", *more) == 2
    assert why in capsys.readouterr().err
    assert (tmp_path / "there.png").read_bytes() == b"mine" and set(tmp_path.iterdir()) == before


def test_images_are_not_replaced_by_their_sheet(folders, tmp_path, capsys):
    image = folders[0] / "noise0.png"
    before = image.read_bytes()
    assert outliers(folders[0], "-o", tmp_path / "s.csv", "--sheet", image, "--force") == 2
    assert "noise0.png is one of the images" in capsys.readouterr().err
    assert image.read_bytes() == before and not (tmp_path / "s.csv").exists()
