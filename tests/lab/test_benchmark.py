"""What is compared is the same thing done twice, and the ratio is of the two."""

import json

import numpy as np
import pytest
import torch
from conftest import SAMPLES

from rotation_ssl.embedding import read_chunks
from rotation_ssl.images import find_images
from training.reporting import pages
from training.studies import benchmark, embedding_speed, speed


def test_both_ways_load_the_same_tensors():
    by_timm, ours = benchmark.load_by_timm().state_dict(), benchmark.load_ours().state_dict()
    assert by_timm.keys() == ours.keys() and all(torch.equal(by_timm[name], ours[name]) for name in ours)


def test_the_two_are_taken_in_turns_and_the_first_round_does_not_count():
    calls = []
    base, ours = benchmark.compare(lambda: calls.append("base"), lambda: calls.append("ours"), rounds=2)
    assert calls == ["ours", "base", "base", "ours", "ours", "base"] and base > 0 and ours > 0


def test_the_command_prints_a_ratio(capsys):
    assert benchmark.main(["load", "--rounds", "1"]) == 0
    assert "ratio" in capsys.readouterr().out


# timm's dataset leaves files to the garbage collector
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_features_are_written_in_every_way(tmp_path):
    photos = SAMPLES / "photos"
    for way in embedding_speed.WAYS:
        (tmp_path / way).mkdir()
        embedding_speed.WAYS[way](photos, tmp_path / way, 0)
    theirs = np.load(tmp_path / "timm" / "features.npy")
    ((paths, ours),) = read_chunks(tmp_path / "ours", embedding_speed.LAYER)
    assert theirs.shape == ours.shape == (len(find_images(photos)), embedding_speed.WIDTH) and len(paths) == len(ours)
    # timm crops to crop_pct of the image, and we do not: alike, not equal
    assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.8
    assert (tmp_path / "decoding" / "part-00000.parquet").is_file()


RATES = {"timm": 100.0, "ours": 150.0, "decoding": 200.0, "network": 300.0}


def test_the_ratios_of_features_by_hand(monkeypatch):
    monkeypatch.setattr(embedding_speed, "measure", lambda way, images, workers: RATES[way])
    measured = embedding_speed.measure_embedding(SAMPLES / "photos", 5, 0, 3)
    assert measured["images_per_second"] == RATES and measured["images"] == 5
    text = pages.embedding_text(measured)
    assert "150 images/s, 1.50 times the rate of timm's" in text and "75% of the slower" in text
    with pytest.raises(ValueError, match="holds 5 photographs, not 6: give fewer with --images"):
        embedding_speed.measure_embedding(SAMPLES / "photos", 6, 0, 1)


def test_what_is_recorded_is_what_the_pages_show(monkeypatch, tmp_path, capsys):
    for module in (benchmark, pages):
        monkeypatch.setattr(module, "EMBEDDING_FILE", tmp_path / "embedding.json")
    monkeypatch.setattr(benchmark, "require_committed", lambda what: None)
    monkeypatch.setattr(embedding_speed, "measure", lambda way, images, workers: RATES[way])
    part = "<!-- rendered: {} -->\n{}\n<!-- end -->"
    (tmp_path / "page.md").write_text("\n".join(part.format(name, "") for name in ("embedding", "embeddingratio")))
    command = ["features", "--data", str(SAMPLES / "photos"), "--images", "5", "--rounds", "1"]
    assert benchmark.main(command) == 0 and not (tmp_path / "embedding.json").exists()
    assert benchmark.main([*command, "--record"]) == 0
    recorded = json.loads((tmp_path / "embedding.json").read_text())
    assert recorded["images_per_second"] == RATES and recorded["precision"] in ("fp32", "bf16")
    shown = part.format("embedding", pages.embedding_text(recorded))
    line = pages.embedding_line(recorded)
    assert "1.50 times as fast as" in line and "features of 5 photographs with `rotnet_alexnet.photos`" in line
    assert pages.render_page(tmp_path / "page.md", [], {}) == f"{shown}\n{part.format('embeddingratio', line)}"
    assert pages.embedding_text(recorded) in capsys.readouterr().out


def test_the_recorded_speed_is_what_the_page_shows(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(benchmark, "SPEED_FILE", tmp_path / "speed.json")
    monkeypatch.setattr(benchmark, "require_committed", lambda what: None)
    monkeypatch.setattr(speed, "measure", lambda case: asked.append(case) or speed.Speed(100.0, 1e9, 2**30))
    assert benchmark.main(["speed", "--rounds", "2"]) == 0 and not (tmp_path / "speed.json").exists()
    assert benchmark.main(["speed", "--rounds", "2", "--record"]) == 0
    recorded = json.loads((tmp_path / "speed.json").read_text())
    shown = pages.speed_tables(recorded)
    assert shown in capsys.readouterr().out and "the median of 2 interleaved runs" in shown
    assert "| **training in bf16, as in our commands** | 100 | 1.00 | 100% | 1.0 GiB |" in shown
    cases = len(recorded["cases"])
    assert len(asked) == 4 * cases and asked[:cases] == asked[cases : 2 * cases][::-1] == asked[2 * cases : 3 * cases]


def test_every_other_round_is_backwards():
    assert list(speed.in_turns("ab", 2)) == ["a", "b", "b", "a"]
    assert list(speed.in_turns("ab", 3)) == ["a", "b", "b", "a", "a", "b"]


def test_only_what_pages_show_is_recorded(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["load", "--record"])
    assert "--record is for speed and features: load only prints a ratio" in capsys.readouterr().err
