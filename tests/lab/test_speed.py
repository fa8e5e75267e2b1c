"""What the benchmark counts and compares; no test asserts a time."""

import sys

import pytest
import torch
from conftest import ROOT

from training.reporting.pages import SPEED_FILE, speed_tables
from training.studies import speed
from training.studies.speed import Case, NaiveDataset, flop_per_image, measure


def test_flop_by_hand():
    """NIN takes 250.7 million multiplications an image of 32 pixels forward, as much twice backward, but for the
    gradient of the images, which nobody wants: the first convolution's 5 x 5 x 3 x 192 x 32 x 32.
    """
    forward = 2 * 250_675_968
    assert flop_per_image(32, training=False) == forward
    assert flop_per_image(32, training=True) == 3 * forward - 2 * 5 * 5 * 3 * 192 * 32 * 32


def test_the_naive_pipeline_gives_what_ours_does():
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8).numpy()
    dataset = NaiveDataset(images)
    dataset.augment.transforms = dataset.augment.transforms[:1]  # neither crop nor mirror
    views, labels = dataset[1]
    from rotation_ssl.images import normalize
    from rotation_ssl.rotations import rotate_all, rotation_labels

    mean, std = dataset.normalize.transforms[1].mean, dataset.normalize.transforms[1].std
    upright = normalize(torch.from_numpy(images[1]).permute(2, 0, 1)[None], mean, std)
    torch.testing.assert_close(views, rotate_all(upright))
    assert torch.equal(labels, rotation_labels(1))


@pytest.mark.parametrize("what", ["training", "naive", "features", "product"])
def test_every_case_runs(what):
    size = 64 if what == "product" else 16
    case = Case(what, size=size, images=16, precision="fp32", keep_blocks=False)
    measured = speed._measure(case, steps=1)
    assert measured.images_per_second > 0 and measured.flop > 0 and measured.peak_bytes > 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_measurement_is_a_process_of_its_own():
    """What this process holds does not count there."""
    ballast = torch.ones(2**28, dtype=torch.uint8)  # a quarter of a GiB, touched
    peaks = [speed._measure(Case("product", size=64), 1).peak_bytes, measure(Case("product", size=64), 1).peak_bytes]
    assert peaks[1] < peaks[0] - len(ballast) // 2


def test_the_tables_by_hand():
    def case(rate, flop, gib):
        return {
            "images_per_second": rate, "slowest": rate - 10, "fastest": rate + 10, "flop": flop,
            "peak_bytes": gib * 2**30,
        }  # fmt: skip

    names = (
        "naive", "training in fp32", "training without kept blocks", "training", "features without kept blocks",
        "features", "product 2048", "product 2048 in fp32",
    )  # fmt: skip
    values = ((50, 1e9, 1), (75, 1e9, 2), (100, 1e9, 3), (200, 1e9, 4), (400, 0.5e9, 5), (500, 0.5e9, 6))
    products = ((4, 100e9, 1), (1, 100e9, 1))
    text = speed_tables(
        {
            "device": "a processor", "threads": 2, "rounds": 3, "commit": "0123456789",
            "cases": {name: case(*value) for name, value in zip(names, (*values, *products), strict=True)},
        }
    )  # fmt: skip
    assert "Square matrix multiplications reach 400 GFLOP/s in bf16 and 100 in fp32;" in text
    assert "Training in bf16 ranged from 190 to 210 images/s." in text
    assert "| training, naive: one image at a time, fp32, NCHW | 50 | 1.00 | 50% | 1.0 GiB |" in text
    assert "| **training in bf16, as in our commands** | 200 | 4.00 | 50% | 4.0 GiB |" in text
    assert "| **features in bf16, as in our commands** | 500 | 1.25 | 62% | 6.0 GiB |" in text


def test_the_page_shows_what_was_recorded():
    import json

    assert speed_tables(json.loads(SPEED_FILE.read_text())) in (ROOT / "docs" / "reproduce.md").read_text()
