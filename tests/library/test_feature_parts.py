"""rotation-ssl features -o FOLDER/."""

import inspect
import json
import re
import resource
from pathlib import Path

import fsspec
import pytest
from conftest import SAMPLES, limited
from many_images import contents, part_bytes, write_folder, write_tar

from rotation_ssl import cli
from rotation_ssl.cli import feature_parts
from rotation_ssl.embedding import embed
from rotation_ssl.embedding.files import check_local
from rotation_ssl.embedding.run import Summary


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out if status < 2 else output.err


def test_the_command(tmp_path, capsys):
    images = write_folder(tmp_path / "images", contents(100, 50))
    embed(images, tmp_path / "whole", shard_size=32, batch_size=16, workers=0, sha1=True, precision="fp32")
    options = ("--shard-size", 32, "--batch-size", 16, "--workers", 0, "--sha1", "--precision", "fp32")
    status, text = run(capsys, "features", images, "-o", tmp_path / "out", *options)
    assert status == 1 and text.startswith(f"{tmp_path}/out: 98 images in 4 parts; 2 errors: {tmp_path}/out/errors.pa")
    assert part_bytes(tmp_path / "out") == part_bytes(tmp_path / "whole")
    status, text = run(capsys, "features", images, "-o", f"{tmp_path}/out/", *options, "--resume", "--json")
    assert json.loads(text) == {"folder": f"{tmp_path}/out/", "parts": 4, "images": 98, "errors": 2, "not_read": {}}
    status, text = run(capsys, "features", SAMPLES / "cifar10", "-o", f"{tmp_path}/v1.2/", "--workers", 0)
    assert status == 0 and text == f"{tmp_path}/v1.2/: 40 images in 1 part\n"


def test_files_that_are_no_images_are_counted(tmp_path, capsys):
    images = write_folder(tmp_path / "images", contents(3))
    for name in ("a.avif", "1/b.AVIF", "1/notes", ".hidden.txt", ".Trash-1000/c.gif"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).touch()
    (images / "up").symlink_to(images)
    options = ("--model", "rotnet_nin", "--workers", 0)
    status, text = run(capsys, "features", images, "-o", f"{tmp_path}/out/", *options)
    assert status == 0
    assert text == f"{tmp_path}/out/: 3 images in 1 part\nnot read: 1 file without suffix, 2 .avif files\n"
    memory = fsspec.filesystem("memory")
    memory.put(str(images / "1"), "/some", recursive=True)
    text = run(capsys, "features", "memory://some", "-o", f"{tmp_path}/remote/", *options, "--json")[1]
    memory.rm("/some", recursive=True)
    assert json.loads(text)["not_read"] == {"": 1, ".avif": 1}


@pytest.mark.parametrize("scheme", ["s3://bucket", "file:///tmp", "s3:/bucket"])
def test_an_output_that_is_a_url_is_refused(tmp_path, capsys, monkeypatch, scheme):
    monkeypatch.chdir(tmp_path)
    for output, kind in ((f"{scheme}/feats/", "folder"), (f"{scheme}/f.csv", "file")):
        status, error = run(capsys, "features", SAMPLES / "cifar10", "-o", output, "--workers", 0)
        assert status == 2 and error == (
            f"error: the output must be a local or mounted {kind}, got {output}; give a path\n"
        )
    for output in (f"{scheme}/feats", Path(f"{scheme}/feats")):
        with pytest.raises(ValueError, match=rf"must be a local or mounted folder, got {output}; give a path"):
            embed(SAMPLES / "cifar10", output, "rotnet_nin", workers=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["x.tar", "{0..9}.tar.gz", "x.parquet", "s3://bucket/images"])
def test_sources_of_parts_are_for_a_folder(tmp_path, capsys, source):
    images = source if "://" in source else f"{tmp_path}/{source}"
    status, error = run(capsys, "features", images, "-o", tmp_path / "f.csv")
    assert status == 2
    assert error == (
        f"error: {images} is not a folder on disk; other sources need features in parts: give -o FOLDER/\n"
    )
    write_folder(tmp_path / "photos.tar", contents(1))
    assert run(capsys, "features", tmp_path / "photos.tar", "-o", tmp_path / "f.csv", "--model", "rotnet_nin")[0] == 0


def test_a_windows_drive_is_no_url():
    for output in ("C:/feats", "c:\\feats", "feats", "a/b:/c"):
        check_local(output)


def test_every_option_arrives(monkeypatch, capsys):
    expected = {
        "layers": ["block1", "block3"], "pool": "max", "grid": 2, "batch_size": 7, "device": "cuda:1", "engine": "ray",
        "address": "host:6379", "format": "npy", "shard_size": 5, "workers": 3, "precision": "bf16",
        "dtype": "float16", "sha1": True, "resume": True,
    }  # fmt: skip
    parameters = inspect.signature(embed).parameters
    assert {name for name, parameter in parameters.items() if parameter.kind == parameter.KEYWORD_ONLY} == set(expected)
    assert all(parameters[name].default != value for name, value in expected.items())
    asked = []
    monkeypatch.setattr(
        feature_parts, "embed", lambda *arguments, **options: asked.append((arguments, options)) or Summary(1, 2, 0, {})
    )
    arguments = ["features", "images", "-o", "out/", "--model", "rotnet_alexnet"]
    for name, value in expected.items():
        arguments.append(f"--{name.replace('_', '-')}")
        arguments += [] if value is True else value if isinstance(value, list) else [str(value)]
    assert cli.main(arguments) == 0
    assert asked == [(("images", "out/", "rotnet_alexnet"), expected)]
    with pytest.raises(SystemExit):
        cli.main(["features", "--help"])
    options = set(
        re.findall(r"^  (?:-\w(?: \w+)?, )?(--[a-z0-9-]+)", capsys.readouterr().out.split("options:")[1], re.M)
    )
    assert options - set(arguments) == {"--help", "--output", "--force", "--strict", "--json"}


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("out/", ("--strict",), "--strict is for a single file"),
        ("out/", ("--force",), "--force is for a single file"),
        ("out/", ("--format", "csv"), "format must be one of parquet, safetensors, npy"),
        ("f.csv", ("--shard-size", "5"), "--shard-size is for features in parts: give a folder, -o"),
        ("f.csv", ("--resume",), "--resume is for features in parts"),
        ("f.csv", ("--precision", "bf16"), "--precision is for features in parts"),
        ("out/", ("--workers", "-1"), "argument --workers: must be a whole number, got -1"),
    ],
)
def test_options_of_the_other_form(tmp_path, capsys, output, options, message):
    try:
        status, error = run(capsys, "features", SAMPLES / "cifar10", "-o", f"{tmp_path}/{output}", *options)
    except SystemExit as stopped:
        status, error = stopped.code, capsys.readouterr().err
    assert status == 2 and message in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["parquet", "npy", "safetensors"])
def test_a_disk_that_takes_no_more(tmp_path, capsys, form):
    """The third part does not fit: two are whole, nothing is half-written, and --resume writes the rest."""
    for number, count in enumerate((10, 20, 90, 10)):
        write_tar(tmp_path / f"{number}.tar", contents(count))
    options = (f"{tmp_path}/{{0..3}}.tar", "--format", form, "--workers", "0", "--precision", "fp32")
    out = ("-o", f"{tmp_path}/out/")
    # writing more to a file is an error, as on a disk that is full
    with limited(resource.RLIMIT_FSIZE, 40_000):
        status, told = run(capsys, "features", *options, *out)
    error = told.splitlines()[-1]
    assert status == 2 and f"part-00002 cannot be written to {tmp_path}/out (" in error
    assert "File too large); " in error and error.endswith("go on with --resume")
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {f"part-00000.{form}", f"part-00001.{form}"}
    assert not [name for name in part_bytes(tmp_path / "out") if "part-00002." + form in name or name.endswith(".tmp")]
    assert run(capsys, "features", *options, *out, "--resume")[0] == 0
    assert run(capsys, "features", *options, "-o", f"{tmp_path}/whole/")[0] == 0
    assert part_bytes(tmp_path / "out") == part_bytes(tmp_path / "whole")
