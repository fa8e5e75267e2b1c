"""Features read back, and the nearest neighbours among them."""

import json

import numpy as np
import pytest
import torch
from conftest import SAMPLES
from many_images import contents, rows_of, write_folder
from torch.nn import functional as F

from rotation_ssl import cli
from rotation_ssl.embedding import embed, embed_images, load, nearest, read_chunks, reading

SMALL = {"model": "rotnet_nin", "shard_size": 16, "batch_size": 8, "workers": 0, "precision": "fp32"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("few") / "images", contents(60, 20))


@pytest.fixture(scope="module", params=["parquet", "npy", "safetensors"])
def out(request, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / request.param
    embed(images, folder, format=request.param, **SMALL)
    return folder


@pytest.mark.parametrize("rows", [5, 8192])
def test_chunks_are_the_rows(out, monkeypatch, rows):
    monkeypatch.setattr(reading, "ROWS", rows)
    chunks = list(read_chunks(out, "block2"))
    assert all(len(names) == len(features) <= rows and features.shape[1] == 192 for names, features in chunks)
    found = {name: row.tobytes() for names, features in chunks for name, row in zip(names, features, strict=True)}
    assert found == {name: row[0] for name, row in rows_of(out).items()}


@pytest.mark.parametrize("rows", [5, 8192])
@pytest.mark.parametrize("k", [1, 7, 100])
def test_neighbours_are_exact(out, monkeypatch, rows, k):
    monkeypatch.setattr(reading, "ROWS", rows)
    stored = rows_of(out)
    features = torch.tensor(np.stack([np.frombuffer(row[0], np.float32) for row in stored.values()]))
    queries = torch.randn(3, 192)
    expected, order = F.cosine_similarity(queries[:, None], features[None], dim=2).topk(min(k, len(features)))
    similarity, paths = nearest(out, queries, k)
    torch.testing.assert_close(similarity, expected)
    assert paths == [[list(stored)[i] for i in row] for row in order.tolist()]


def test_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "ROWS", 3)
    (_, content), *_ = contents(1)
    embed(write_folder(tmp_path / "x", ((f"{i:02d}.png", content) for i in range(10))), tmp_path / "out", **SMALL)
    queries = embed_images(tmp_path / "out", [tmp_path / "x" / "05.png"])["block2"]
    similarity, paths = nearest(tmp_path / "out", queries, 4)
    assert len(set(paths[0])) == 4
    torch.testing.assert_close(similarity, torch.ones(1, 4))


def test_float16(images, tmp_path):
    embed(images, tmp_path / "out", dtype="float16", **SMALL)
    queries = embed_images(tmp_path / "out", [images / "3" / "000003.png"])["block2"]
    similarity, paths = nearest(tmp_path / "out", queries, 1)
    assert paths == [["3/000003.png"]] and 0.9999 < similarity.item() < 1.0001


def test_what_is_refused(out, images, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        nearest(out, torch.zeros(1, 192), 0)
    with pytest.raises(ValueError, match=r"queries \(1, 191\) do not fit layer block2"):
        nearest(out, torch.zeros(1, 191))
    with pytest.raises(ValueError, match="no layer block9; it has block2"):
        list(read_chunks(out, "block9"))
    with pytest.raises(ValueError, match=r"few has no manifest\.json: it is no folder of features; .*-o FOLDER/"):
        load(tmp_path / "few")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged or of another version"):
        load(tmp_path)
    (tmp_path / "manifest.json").write_bytes((out / "manifest.json").read_bytes())
    with pytest.raises(ValueError, match="has no parts yet"):
        load(tmp_path)
    with pytest.raises(ValueError, match="does not decode"):
        embed_images(out, [images / "5" / "000019.png"])
    manifest = json.loads((out / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="has other weights than those that made"):
        embed_images(tmp_path, [images / "3" / "000003.png"])


def test_the_command(tmp_path, capsys):
    query = SAMPLES / "cifar10" / "cat_00000.png"
    assert cli.main(["features", str(SAMPLES / "cifar10"), "-o", f"{tmp_path}/out/", "--workers", "0"]) == 0
    capsys.readouterr()
    assert cli.main(["neighbours", f"{tmp_path}/out", str(query), "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0] == "1.0000  cat_00000.png"
    assert cli.main(["neighbours", f"{tmp_path}/out", str(query), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["neighbours"]) == 10 and result["layer"] == "conv4"
    for arguments, message in (
        ([f"{tmp_path}/out", str(query), "--layer", "conv9"], "has no layer conv9; it has conv4"),
        ([f"{tmp_path}/nowhere", str(query)], "nowhere has no manifest.json"),
        ([f"{tmp_path}/out", f"{tmp_path}/gone.png"], f"error: image {tmp_path}/gone.png does not exist"),
        ([f"{tmp_path}/out", str(tmp_path)], f"error: image {tmp_path} does not decode (it is not a regular file); "),
    ):
        assert cli.main(["neighbours", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
