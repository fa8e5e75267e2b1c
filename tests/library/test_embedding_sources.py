"""Which images a source has, and how they become shards."""

import os
import shutil

import fsspec
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from many_images import contents, image_bytes, rows_of, write_folder, write_tar
from pyarrow import parquet

from rotation_ssl.embedding import embed
from rotation_ssl.embedding.sources import find_shards, read_bytes, read_items
from rotation_ssl.images import find_images

SMALL = {"shard_size": 16, "batch_size": 8, "workers": 0, "precision": "fp32"}


def shards_of(source, size=10):
    return list(find_shards(str(source), size))


def names_of(source, size=10):
    return [name for shard in shards_of(source, size) for name, _ in read_items(shard)]


NAMES = st.text(st.sampled_from("ab.-_ \u00e9{}"), min_size=1, max_size=3).filter(lambda name: name.strip("."))
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(tuple)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(paths=st.sets(PATHS, min_size=1, max_size=12), size=st.integers(1, 5))
def test_shards_of_a_folder(tmp_path, paths, size):
    """Consecutive blocks of the paths in their order, which is that of whole paths as text; no image is lost."""
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    for path in paths:
        file = (tmp_path / "x").joinpath(*(f"{name}d" for name in path[:-1]), f"{path[-1]}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    shards = shards_of(tmp_path / "x", size)
    names = [name for shard in shards for name in shard.names]
    visible = [f.relative_to(tmp_path / "x").as_posix() for f in (tmp_path / "x").rglob("*.png") if f.name[0] != "."]
    assert names == sorted(visible) and [shard.number for shard in shards] == list(range(len(shards)))
    assert all(len(shard.names) == size for shard in shards[:-1]) and -(-len(names) // size) == len(shards)
    assert len({shard.digest for shard in shards}) == len(shards)


def test_the_images_of_a_folder_are_those_of_a_single_file(tmp_path):
    folder = tmp_path / "images"
    for name in ("b/1.png", "a.JPG", "a-b/2.webp", "a/.hidden.png", "notes.txt", "b.png/3.png", ".deep/4.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "link.png").symlink_to("a.JPG")
    (folder / "loop").symlink_to(".")
    os.mkfifo(folder / "pipe.png")
    expected = {path.relative_to(folder).as_posix() for path in find_images(folder)}
    assert names_of(folder) == sorted(expected) and {"gone.png", "link.png", "a.JPG"} < expected


def test_a_name_with_braces_is_a_folder_where_there_is_one(tmp_path):
    write_folder(tmp_path / "{a,b}", contents(2))
    assert len(names_of(tmp_path / "{a,b}")) == 2


def test_tars(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("a0.tar", "a1.tar", "b/a0.tar"):
        write_tar(tmp_path / name, contents(2))
    shards = shards_of(f"{tmp_path}/a{{0..1}}.tar")
    assert [shard.name for shard in shards] == ["a0.tar", "a1.tar"] and [shard.number for shard in shards] == [0, 1]
    assert names_of(f"{tmp_path}/{{,b/}}a0.tar") == [
        f"{tar}/{name}" for tar in ("a0.tar", "b/a0.tar") for name in ("0/000000.png", "1/000001.png")
    ]


@pytest.mark.parametrize("group", [3, 1000])
def test_rows_of_a_parquet_file(tmp_path, group):
    """Blocks of rows, wherever the file's own groups end."""
    images = list(contents(25))
    table = pyarrow.table({"id": range(25), "jpg": [content for _, content in images]})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=group)
    shards = shards_of(tmp_path / "x.parquet")
    assert [shard.rows for shard in shards] == [(0, 10), (10, 20), (20, 25)]
    items = [item for shard in shards for item in read_items(shard)]
    assert items == [(f"x.parquet:{number}", content) for number, (_, content) in enumerate(images)]
    table = table.append_column("path", [[name for name, _ in images]])
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=group)
    assert [item for shard in shards for item in read_items(shard)] == images


def test_paths_of_a_parquet_file(tmp_path):
    folder = write_folder(tmp_path / "images", contents(3))
    values = ["images/0/000000.png", str(folder / "1" / "000001.png"), (folder / "2" / "000002.png").as_uri(), None]
    parquet.write_table(pyarrow.table({"path": values}), tmp_path / "list.parquet")
    (shard,) = shards_of(tmp_path / "list.parquet")
    *items, (name, error) = read_items(shard)
    assert [name for name, _ in items] == values[:3] and name == "list.parquet:3" and "has no image" in str(error)
    assert [read_bytes(url) for _, url in items] == [content for _, content in contents(3)]


def test_one_source_in_every_form_gives_the_same_features(tmp_path):
    images = [(f"{number:02d}.png", image_bytes(number)) for number in range(20)]
    forms = {
        "folder": write_folder(tmp_path / "images", images),
        "file": write_folder(tmp_path / "images", images).as_uri(),
        "tar": write_tar(tmp_path / "x.tar", images),
        "rows": tmp_path / "x.parquet",
        "memory": "memory://many/images",
        "tar in memory": "memory://many/{0..0}.tar",
        "rows in memory": "memory://many/x.parquet",
    }
    table = pyarrow.table({"path": [name for name, _ in images], "bytes": [content for _, content in images]})
    parquet.write_table(table, forms["rows"])
    memory = fsspec.filesystem("memory")
    for name, content in images:
        memory.pipe(f"/many/images/{name}", content)
    memory.pipe("/many/0.tar", forms["tar"].read_bytes())
    memory.pipe("/many/x.parquet", forms["rows"].read_bytes())
    found = {}
    for form, source in forms.items():
        embed(source, tmp_path / form, **SMALL)
        found[form] = {name.removeprefix("x.tar/").removeprefix("0.tar/"): row
                       for name, row in rows_of(tmp_path / form).items()}  # fmt: skip
    memory.rm("/many", recursive=True)
    assert len(found["folder"]) == 20 and all(rows == found["folder"] for rows in found.values())


def test_names_that_are_no_text(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"c\xe9.png", b"broken\xff.png"):
        with open(os.fsencode(folder) + b"/" + name, "wb") as stream:  # noqa: PTH123
            stream.write(image_bytes(0) if name[0] == ord("c") else b"")
    embed(folder, tmp_path / "out", **SMALL)
    assert list(rows_of(tmp_path / "out")) == ["c\\xe9.png"]


def test_files_that_are_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it is not a regular file"):
        read_bytes(str(tmp_path / "pipe"))
    with pytest.raises(FileNotFoundError, match="it does not exist"):
        read_bytes(str(tmp_path / "gone"))
    monkeypatch.setattr("rotation_ssl.embedding.sources.MAX_IMAGE_BYTES", 10)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="more than the 10 bytes allowed"):
        read_bytes(str(tmp_path / "large"))


def write_table(file, **columns):
    parquet.write_table(pyarrow.table(columns), file)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "bad.parquet").write_bytes(b"no parquet file")
    write_table(tmp_path / "none.parquet", id=[1], name=["x"])
    write_table(tmp_path / "two.parquet", a=[b"x"], b=[b"x"])
    write_table(tmp_path / "numbers.parquet", path=[1])
    refusals = {
        "empty": r"empty holds no images \(\.png, ",
        "nowhere": "nowhere is not a folder, nor a .tar or .parquet file",
        "notes.txt": "notes.txt is not a folder, nor a .tar or .parquet file",
        "memory://nowhere": "memory://nowhere is not a folder",
        "nothing://x": "nothing://x cannot be opened",
        "{0..9.tar": "not closed or are nested",
        "{a,b}": "is neither a folder nor tar nor parquet files",
        "{0..4}.tar": r"0\.tar, .*1\.tar, .*2\.tar and 2 more of 5 tar files do not exist",
        "{bad,bad}.parquet": r"gives files twice: .*bad\.parquet",
        "bad.parquet": "bad.parquet is damaged or no parquet file",
        "none.parquet": "has neither a column of bytes nor a text column 'path'; it has id, name",
        "numbers.parquet": "has neither a column of bytes nor a text column 'path'; it has path",
        "two.parquet": "two.parquet has several columns of bytes, a, b; keep that of the images",
    }
    for name, message in refusals.items():
        with pytest.raises(ValueError, match=message):
            embed(name if "://" in name else tmp_path / name, tmp_path / "out", **SMALL)
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet"):
        embed(tmp_path / "gone.parquet", tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
