"""Features in parts on one machine: the same whatever computes them, whole whatever happens."""

import dataclasses
import errno
import hashlib
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import limited
from filelock import FileLock
from many_images import BROKEN, contents, errors_of, image_bytes, part_bytes, rows_of, write_folder, write_tar
from pyarrow import parquet
from safetensors.numpy import load_file

from rotation_ssl.embedding import embed, load, read_chunks, run
from rotation_ssl.embedding import local as local_engine
from rotation_ssl.embedding import parts as parts_module
from rotation_ssl.embedding.sources import read_items
from rotation_ssl.features import extract_features
from rotation_ssl.images import normalize, read_images

COUNT, BROKEN_EVERY = 300, 100
SMALL = {"model": "rotnet_nin", "shard_size": 64, "batch_size": 16, "workers": 0, "precision": "fp32"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("many") / "images", contents(COUNT, BROKEN_EVERY))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The features of all images, in one go by this process."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    embed(images, folder, sha1=True, **SMALL)
    return folder


def test_rows_and_errors(images, whole):
    rows, errors = rows_of(whole), errors_of(whole)
    names = dict(contents(COUNT, BROKEN_EVERY))
    assert rows.keys() == {name for name, content in names.items() if content != BROKEN}
    assert errors.keys() == names.keys() - rows.keys() and len(errors) == 3
    assert all(row[-1] == hashlib.sha1(names[name]).hexdigest() for name, row in rows.items())
    for name, reason in errors.items():
        assert reason.startswith(f"image {name} does not decode (cannot identify image file {name})")


def test_features_are_those_of_one_batch(images, whole):
    """The values of the old single file, to rounding: batches of other sizes may add in another order."""
    rows = rows_of(whole)
    model = timm.create_model("rotnet_nin", pretrained=True)
    names = sorted(rows)[:40]
    batch = read_images([images / name for name in names], 32)
    batch = normalize(batch, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    expected = extract_features(model, batch, ["block2"])["block2"]
    got = torch.tensor(np.stack([np.frombuffer(rows[name][0], np.float32) for name in names]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_their_batch(images, whole, tmp_path):
    embed(images / "3", tmp_path / "out", **{**SMALL, "shard_size": 5})
    expected = rows_of(whole)
    rows = rows_of(tmp_path / "out")
    assert len(rows) > 40 and all(row[0] == expected[f"3/{name}"][0] for name, row in rows.items())


def test_parts(whole):
    files = sorted(path.name for path in whole.iterdir())
    assert files == [".lock", "errors", "errors.parquet", "manifest.json", *(f"part-0000{i}.parquet" for i in range(5))]
    schema = parquet.read_schema(whole / "part-00000.parquet")
    assert [str(field.type) for field in schema] == ["string", "string", "fixed_size_list<element: float>[192]"]
    rows = [parquet.read_metadata(whole / f"part-0000{i}.parquet").num_rows for i in range(5)]
    assert sum(rows) == COUNT - 3 and all(64 - 3 <= number <= 64 for number in rows[:-1])
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["model"] == "rotnet_nin.cifar10" and manifest["layers"] == {"block2": 192}
    assert (manifest["size"], manifest["precision"], manifest["pool"]) == (32, "fp32", "avg")
    assert len(manifest["weights_sha256"]) == 64 and Path(manifest["source"]).is_absolute()


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_are_equal_whatever_workers(images, whole, tmp_path, workers):
    embed(images, tmp_path / "out", sha1=True, **{**SMALL, "workers": workers})
    assert part_bytes(tmp_path / "out") == part_bytes(whole)


def test_formats_hold_the_same(images, whole, tmp_path):
    expected = {name: row[0] for name, row in rows_of(whole).items()}
    for form in ("npy", "safetensors"):
        embed(images, tmp_path / form, format=form, **SMALL)
        assert {name: row[0] for name, row in rows_of(tmp_path / form).items()} == expected
        assert errors_of(tmp_path / form) == errors_of(whole)
    # as users of these formats read them
    array = np.load(tmp_path / "npy" / "part-00001.npy")
    names = parquet.read_table(tmp_path / "npy" / "part-00001.parquet").column("path").to_pylist()
    assert [row.tobytes() for row in array] == [expected[name] for name in names]
    assert np.array_equal(load_file(tmp_path / "safetensors" / "part-00001.safetensors")["block2"], array)


def test_memory_maps(images, tmp_path):
    embed(images, tmp_path / "npy", format="npy", **SMALL)
    assert all(isinstance(part.features["block2"], np.memmap) for part in load(tmp_path / "npy"))


@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_more_parts_than_a_process_may_open_files(whole, tmp_path, form):
    manifest = dataclasses.replace(parts_module.read_manifest(whole), format=form, layers={"a": 300}, sha1=False)
    parts_module.start(tmp_path, manifest, resume=False)
    for part in range(50):
        numbers = (2 * part, 2 * part + 1)
        rows = parts_module.Rows(manifest)
        rows.add([f"{i}.png" for i in numbers], {"a": np.repeat(np.array([numbers]).T, 300, 1)})
        parts_module.write_part(tmp_path, part, manifest, rows, "")
    with Path(os.devnull).open() as newest, limited(resource.RLIMIT_NOFILE, newest.fileno() + 25):
        parts = load(tmp_path)
        rows = [(path, row.sum()) for part in parts for path, row in zip(part.paths, part.features["a"], strict=True)]
        read = [len(paths) for paths, _ in read_chunks(tmp_path, "a")]
    assert len(parts) == 50 and rows == [(f"{i}.png", i * 300.0) for i in range(100)], rows[:3]
    assert sum(read) == 100


def test_float16_and_layers(images, whole, tmp_path):
    embed(images, tmp_path / "out", layers=["block1", "block2"], dtype="float16", pool="max", grid=2, **SMALL)
    schema = parquet.read_schema(tmp_path / "out" / "part-00000.parquet")
    types = [f"fixed_size_list<element: halffloat>[{width}]" for width in (384, 768)]
    assert [str(field.type) for field in schema][1:] == types
    embed(images, tmp_path / "half", dtype="float16", **SMALL)
    half, single = rows_of(tmp_path / "half"), rows_of(whole)
    for name, row in single.items():
        assert np.frombuffer(row[0], np.float32).astype(np.float16).tobytes() == half[name][0]


def test_features_that_do_not_fit_are_errors(images, whole, tmp_path, monkeypatch):
    def scaled(model, manifest):
        extract = make(model, manifest)
        return lambda pixels: {layer: part * 1e7 for layer, part in extract(pixels).items()}

    make = local_engine.make_extractor
    monkeypatch.setattr("rotation_ssl.embedding.run.make_extractor", scaled)
    summary = embed(images / "3", tmp_path / "out", dtype="float16", **SMALL)
    assert summary.images == 0 and "its features are not finite in float16" in errors_of(tmp_path / "out").values()


def interrupted(monkeypatch, parts):
    """The run ends when so many parts are there."""
    write = parts_module.write_part

    def stop(folder, number, *args):
        if number == parts:
            raise KeyboardInterrupt
        write(folder, number, *args)

    monkeypatch.setattr(local_engine, "write_part", stop)


def test_resume(images, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupted(patched, 2)
        embed(images, out, sha1=True, **SMALL)
    (out / "part-00002.parquet.77.tmp").write_bytes(b"of a run that was killed")
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert len(before) == 2
    with pytest.raises(ValueError, match="out already has parts; give --resume to go on with them"):
        embed(images, out, sha1=True, **SMALL)
    embed(images, out, sha1=True, resume=True, **SMALL)
    assert part_bytes(out) == part_bytes(whole)
    assert before == {path: path.stat().st_mtime_ns for path in before}, "parts that are there are not made again"
    embed(images, out, sha1=True, resume=True, **SMALL)
    assert part_bytes(out) == part_bytes(whole), "nothing is left to do"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "rotnet_alexnet.photos"}, "model is 'rotnet_nin.cifar10' there and 'rotnet_alexnet.photos' now"),
        ({"layers": ["block1"]}, r"layers is \{'block2': 192\} there and \{'block1': 96\} now"),
        ({"shard_size": 65}, "shard_size is 64 there and 65 now"),
        ({"pool": "max", "dtype": "float16"}, "pool is 'avg' there and 'max' now; dtype is 'float32' there and"),
        ({"format": "npy"}, "format is 'parquet' there and 'npy' now"),
    ],
)
def test_another_manifest_is_refused(images, whole, changes, message):
    before = part_bytes(whole)
    with pytest.raises(ValueError, match=rf"out has other settings: .*{message}.*give another --output"):
        embed(images, whole, resume=True, **{"sha1": True, **SMALL, **changes})
    assert part_bytes(whole) == before


def test_another_normalisation_is_refused(images, whole, monkeypatch):
    """The mean and std of a configuration are no part of the weights."""
    told = run.resolve_model_data_config
    monkeypatch.setattr(run, "resolve_model_data_config", lambda model: {**told(model), "mean": (0.5, 0.5, 0.5)})
    with pytest.raises(ValueError, match=r"mean is .* there and \[0\.5, 0\.5, 0\.5\] now"):
        embed(images, whole, resume=True, sha1=True, **SMALL)


def test_a_source_that_changed_is_refused(tmp_path):
    images = write_folder(tmp_path / "images", contents(40))
    embed(images, tmp_path / "out", **{**SMALL, "shard_size": 10})
    (images / "0" / "0.png").write_bytes(image_bytes(0))
    with pytest.raises(ValueError, match="images has changed since part-00000 was made of it"):
        embed(images, tmp_path / "out", resume=True, **{**SMALL, "shard_size": 10})
    (images / "0" / "0.png").unlink()
    for path in images.glob("6/*"):
        path.unlink()
    with pytest.raises(ValueError, match="images has changed since part-00003 was made of it"):
        embed(images, tmp_path / "out", resume=True, **{**SMALL, "shard_size": 10})
    (tmp_path / "out" / "part-00003.parquet").rename(tmp_path / "out" / "part-00009.parquet")
    with pytest.raises(ValueError, match="images has fewer images than part-00009 was made of"):
        embed(images, tmp_path / "out", resume=True, **{**SMALL, "shard_size": 10})


def test_two_runs_into_one_folder(images, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="another run is writing to"):
        embed(images, tmp_path / "out", **SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file exists and is not a folder"):
        embed(images, tmp_path / "file", **SMALL)


def test_a_tar_that_is_cut(tmp_path):
    names = list(contents(30))
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", names[10 * number : 10 * number + 10])
    content = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(content[: len(content) // 2])
    summary = embed(tmp_path / "{0..2}.tar", tmp_path / "out", **SMALL)
    rows, errors = rows_of(tmp_path / "out"), errors_of(tmp_path / "out")
    assert summary.parts == 3 and 20 < summary.images == len(rows) < 30
    assert list(errors) == ["1.tar"] and errors["1.tar"].startswith("tar 1.tar is damaged, cut or no tar file")
    expected = {f"{number // 10}.tar/{name}" for number, (name, _) in enumerate(names)}
    assert rows.keys() < expected and all(f"{number}.tar" in {name[:5] for name in rows} for number in range(3))


def test_a_shard_that_vanishes(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", contents(10))
    shards = f"{tmp_path}/{{0..2}}.tar"

    def vanish(shard):
        if shard.number == 2:
            (tmp_path / "2.tar").unlink()
        return read_items(shard)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(local_engine, "read_items", vanish)
        with pytest.raises(FileNotFoundError, match=r"2\.tar"):
            embed(shards, tmp_path / "out", **SMALL)
    assert sorted(path.name for path in (tmp_path / "out").glob("part*")) == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    with pytest.raises(ValueError, match=r"2\.tar of 3 tar files do not exist"):
        embed(shards, tmp_path / "out", resume=True, **SMALL)
    write_tar(tmp_path / "2.tar", contents(10))
    assert embed(shards, tmp_path / "out", resume=True, **SMALL).images == 30


def test_files_that_vanish(tmp_path):
    """One is an error like others; a whole shard of them means that the source is not there."""
    images = write_folder(tmp_path / "images", contents(220))
    (images / "0" / "gone.png").symlink_to("nowhere")

    def vanish(shard):
        if shard.number == 1:
            images.rename(tmp_path / "elsewhere")
        return read_items(shard)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(local_engine, "read_items", vanish)
        with pytest.raises(ValueError, match=r"none of the 100 files of part-00001 can be opened, like .*\.png"):
            embed(images, tmp_path / "out", **{**SMALL, "shard_size": 100})
    assert len(list((tmp_path / "out").glob("part*"))) == 1
    assert parquet.read_table(tmp_path / "out" / "errors" / "part-00000.parquet").to_pylist()[0] == {
        "path": "0/gone.png",
        "reason": "it does not exist",
    }


@pytest.fixture
def forked():
    """Processes that decode are forked: others, the default from Python 3.14 on, do not see what a test replaces."""
    method = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("fork", force=True)
    yield
    multiprocessing.set_start_method(method, force=True)


@pytest.mark.usefixtures("forked")
# Python 3.12 and later warn of every fork beside torch's threads
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_decoding_process_that_is_killed(images, whole, tmp_path, monkeypatch):
    """The second image kills its process; afterwards the run goes on."""

    def killed(name, content, manifest):
        if name == "3/000073.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(name, content, manifest)

    decode, before = local_engine.decode, threading.enumerate()
    with monkeypatch.context() as patched:
        patched.setattr(local_engine, "decode", killed)
        with pytest.raises(
            OSError, match=r"^a data-loading worker was killed .*fewer workers.*; run it again, or resume it$"
        ):
            embed(images, tmp_path / "out", sha1=True, **{**SMALL, "workers": 2})
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        # a queue's own thread may still be ending
        thread.join(30)
    assert not [thread for thread in left if thread.is_alive()]
    embed(images, tmp_path / "out", sha1=True, resume=True, **SMALL)
    assert part_bytes(tmp_path / "out") == part_bytes(whole)


def test_a_part_without_images(tmp_path):
    images = write_folder(tmp_path / "images", contents(20, broken_every=1))
    for form in ("parquet", "npy", "safetensors"):
        summary = embed(images, tmp_path / form, format=form, **{**SMALL, "shard_size": 10})
        assert (summary.parts, summary.images, summary.errors) == (2, 0, 20)
        assert rows_of(tmp_path / form) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "engine must be one of local, ray, got 'spark'"),
        ({"format": "csv"}, "format must be one of parquet, safetensors, npy, got 'csv'"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, got 'int8'"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"address": "127.0.0.1:1"}, "address 127.0.0.1:1 is for the engine ray: give the engine ray too"),
        ({"workers": -1}, "workers 0, got 64 and -1"),
        ({"format": "npy", "layers": ["block1", "block2"]}, "npy takes one layer, not block1, block2"),
        ({"layers": ["conv9"]}, "no layer conv9"),
        ({"model": "rotnet_nope"}, "no model 'rotnet_nope'"),
        ({"pool": "min"}, "pool must be one of"),
        ({"pool": None}, "pool must be one of avg, max, flatten"),
        ({"batch_size": 0}, "grid and batch_size must be at least 1, got 1 and 0"),
        ({"grid": 0}, "grid and batch_size must be at least 1"),
        ({"precision": "fp16"}, "precision must be one of auto, fp32, bf16"),
    ],
)
def test_options_out_of_range(images, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        embed(images, tmp_path / "out", **{**SMALL, **options})
    assert not (tmp_path / "out").exists()


def test_without_the_extra(images, whole, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    for missing, engine in (("pyarrow", "local"), ("ray", "ray")):
        with monkeypatch.context() as patched:
            patched.setattr("importlib.util.find_spec", lambda name, gone=missing: None if name == gone else find(name))
            with pytest.raises(ImportError, match=rf"needs? {missing}: pip install 'rotation-ssl\[scale\]'"):
                embed(images, tmp_path / "out", engine=engine, **SMALL)
            if missing == "pyarrow":
                with pytest.raises(ImportError, match="features in parts need pyarrow"):
                    load(whole)


def test_a_disk_that_fails_stops_the_run_and_loses_nothing(images, whole, tmp_path, monkeypatch):
    """Files of the second part cannot be read; when the disk is back, the run goes on with that part."""
    read, opened = local_engine.read_bytes, []

    def fail(url):
        opened.append(url)
        if len(opened) > 70:
            raise OSError(errno.EIO, "Input/output error", url)
        return read(url)

    monkeypatch.setattr(local_engine, "read_bytes", fail)
    with pytest.raises(OSError, match=r"cannot be read .*Input/output error.* go on with --resume"):
        embed(images, tmp_path / "out", sha1=True, **SMALL)
    monkeypatch.undo()
    embed(images, tmp_path / "out", sha1=True, resume=True, **SMALL)
    assert part_bytes(tmp_path / "out") == part_bytes(whole)


@pytest.mark.parametrize("name", ["manifest.json", "notes.txt", "errors.parquet.mine.tmp"])
def test_files_of_others_are_left_alone(images, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ValueError, match=r"has other files|is damaged or of another version"):
        embed(images, tmp_path / "out", **SMALL)
    assert (tmp_path / "out" / name).read_text() == "mine"
