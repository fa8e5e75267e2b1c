"""Which images a source has, and how they become shards."""

import errno
import io
import os
import shutil
import socket

import fsspec
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from many_images import contents, errors_of, image_bytes, rows_of, write_folder, write_tar
from pyarrow import parquet

from rotation_ssl.embedding import embed
from rotation_ssl.embedding.files import open_url, read_bytes
from rotation_ssl.embedding.sources import find_shards, read_items
from rotation_ssl.images import FAILURES, find_images
from rotation_ssl.pretraining.shards import index_shards, is_shards

SMALL = {"model": "rotnet_nin", "shard_size": 16, "batch_size": 8, "workers": 0, "precision": "fp32"}


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
    every = [file.relative_to(tmp_path / "x") for file in (tmp_path / "x").rglob("*.png")]
    visible = [path.as_posix() for path in every if not any(name.startswith(".") for name in path.parts)]
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


HIDDEN = (".Trash-1000", ".thumbnails/large", ".AppleDouble", "a/@eaDir", "a/__MACOSX/b")


def test_hidden_and_system_folders_are_not_searched(tmp_path):
    names = [f"{folder}/x.png" for folder in HIDDEN]
    write_folder(tmp_path / "images", [(name, image_bytes(0)) for name in ("a/x.png", "b.c/@x/x.png", *names)])
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "images"), "/hidden", recursive=True)
    for source in (tmp_path / "images", "memory://hidden"):
        assert names_of(source) == ["a/x.png", "b.c/@x/x.png"]
    memory.rm("/hidden", recursive=True)
    # one that is named is read
    for folder in HIDDEN:
        assert names_of(tmp_path / "images" / folder) == ["x.png"]
        assert find_images(tmp_path / "images" / folder) == [tmp_path / "images" / folder / "x.png"]


def test_a_name_with_braces_is_a_folder_where_there_is_one(tmp_path):
    write_folder(tmp_path / "{a,b}", contents(2))
    assert len(names_of(tmp_path / "{a,b}")) == 2


def test_a_name_with_a_star_is_a_file_where_there_is_one(tmp_path):
    write_tar(tmp_path / "*.tar", contents(2))
    assert names_of(tmp_path / "*.tar") == ["*.tar/0/000000.png", "*.tar/1/000001.png"]


def test_tars(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("a0.tar", "a1.tar", "b/a0.tar"):
        write_tar(tmp_path / name, contents(2))
    shards = shards_of(f"{tmp_path}/a{{0..1}}.tar")
    assert [shard.name for shard in shards] == ["a0.tar", "a1.tar"] and [shard.number for shard in shards] == [0, 1]
    assert names_of(f"{tmp_path}/{{,b/}}a0.tar") == [
        f"{tar}/{name}" for tar in ("a0.tar", "b/a0.tar") for name in ("0/000000.png", "1/000001.png")
    ]


def test_a_list_that_is_longer_than_a_name(tmp_path):
    names = [f"{number:030d}" for number in range(10)]
    for name in names:
        write_tar(tmp_path / f"{name}.tar", contents(1))
    pattern = f"{tmp_path}/{{{','.join(names)}}}.tar"
    assert len(pattern.rsplit("/", 1)[1]) > 300
    assert [shard.name for shard in shards_of(pattern)] == [f"{name}.tar" for name in names]
    assert is_shards(pattern) and len(index_shards(pattern)) == 10
    with pytest.raises(ValueError, match="is not a folder, nor"):
        shards_of(tmp_path / ("x" * 300))


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


@pytest.mark.parametrize("where", ["page", "header"])
def test_a_parquet_file_that_is_damaged(tmp_path, where):
    """The rows of other groups are kept, and the file is an error like a tar that is cut."""
    images, file = list(contents(30)), tmp_path / "x.parquet"
    table = pyarrow.table({"path": [name for name, _ in images], "png": [content for _, content in images]})
    parquet.write_table(table, file, row_group_size=10, use_dictionary=False)
    chunk = parquet.read_metadata(file).row_group(1).column(1)
    content, start = bytearray(file.read_bytes()), chunk.data_page_offset
    if where == "page":
        start += chunk.total_compressed_size // 2 - 1500
    content[start : start + 3000] = b"\xff" * 3000
    file.write_bytes(content)
    summary = embed(file, tmp_path / "out", **{**SMALL, "shard_size": 15})
    assert (summary.parts, summary.images, summary.errors) == (2, 20, 2)
    assert list(rows_of(tmp_path / "out")) == [name for name, _ in (*images[:10], *images[20:])]
    errors = parquet.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert [error["path"] for error in errors] == ["x.parquet"] * 2
    for error, rows in zip(errors, ("10 to 14", "15 to 19"), strict=True):
        assert error["reason"].startswith(f"rows {rows} of x.parquet are damaged (")


def test_the_rows_of_a_shard_are_read_no_further(tmp_path, monkeypatch):
    table = pyarrow.table({"jpg": [content for _, content in contents(30)]})
    parquet.write_table(table, tmp_path / "x.parquet")
    monkeypatch.setattr("rotation_ssl.embedding.sources.ROWS", 5)
    read, iterate = [], parquet.ParquetFile.iter_batches

    def counted(*args, **options):
        for batch in iterate(*args, **options):
            read.append(len(batch))
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    assert len(list(read_items(shards_of(tmp_path / "x.parquet")[0]))) == 10 and read == [5, 5]


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
    monkeypatch.setattr("rotation_ssl.embedding.files.MAX_IMAGE_BYTES", 10)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="more than the 10 bytes allowed"):
        read_bytes(str(tmp_path / "large"))


class ClientError(Exception):
    """What the client of a remote storage raises: of no family that Python knows."""


class Remote(fsspec.AbstractFileSystem):
    """Files in memory; ``unopened`` cannot be opened, and of the others the byte at ``gap`` cannot be read."""

    protocol = "remote"
    files, unopened, gap, refusal = {}, "", -1, ClientError("403, Forbidden")

    def ls(self, path, detail=True, **kwargs):
        if "forbidden" in path:
            raise ClientError("Forbidden\nrequest 17")
        return [{"name": name, "size": len(content), "type": "file"} for name, content in self.files.items()
                if name.startswith(f"{path.rstrip('/')}/")]  # fmt: skip

    def info(self, path, **kwargs):
        return {"name": path, "type": "file" if path in self.files else "directory", "size": 0}

    def _open(self, path, mode="rb", **kwargs):
        if path == self.unopened:
            raise self.refusal
        if path not in self.files:
            raise FileNotFoundError(path)
        return Failing(self.files[path])


class Failing(io.BytesIO):
    def read(self, size=-1):
        start, content = self.tell(), super().read(size)
        if start <= Remote.gap < self.tell():
            raise ClientError("the connection was reset")
        return content


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """A remote storage with the same images as files, as a tar file and as a parquet file."""
    images = [(f"{number:02d}.png", image_bytes(number, size=64)) for number in range(20)]
    write_table(tmp_path / "x.parquet", path=[name for name, _ in images], bytes=[content for _, content in images])
    files = {f"images/{name}": content for name, content in images}
    files["x.tar"] = write_tar(tmp_path / "x.tar", images).read_bytes()
    files["x.parquet"] = (tmp_path / "x.parquet").read_bytes()
    fsspec.register_implementation("remote", Remote, clobber=True)
    monkeypatch.setattr(Remote, "files", files)
    return Remote


def test_errors_of_remote_storage_are_one_line_with_the_url(remote, monkeypatch, tmp_path):
    for source in ("remote://images", "remote://x.tar", "remote://x.parquet"):
        assert embed(source, tmp_path / f"of {source[9:]}", **SMALL).images == 20
    with pytest.raises(OSError, match=r"^remote://forbidden cannot be read \(Forbidden\)$"):
        embed("remote://forbidden", tmp_path / "out", **SMALL)
    with pytest.raises(FileNotFoundError, match=r"^remote://gone\.tar does not exist$"):
        embed("remote://gone.tar", tmp_path / "gone", **SMALL)
    # an image is one error among the others
    monkeypatch.setattr(remote, "unopened", "images/03.png")
    assert embed("remote://images", tmp_path / "fewer", **SMALL).images == 19
    reason = "remote://images/03.png cannot be read (403, Forbidden)"
    assert errors_of(tmp_path / "fewer") == {"03.png": reason}
    # a network that is down is no error of an image
    monkeypatch.setattr(remote, "refusal", OSError(errno.EHOSTUNREACH, "No route to host"))
    with pytest.raises(OSError, match=r"03\.png cannot be read .*No route to host: 'remote://images/03\.png'\); see"):
        embed("remote://images", tmp_path / "stopped", **SMALL)


def test_a_connection_that_fails_stops_the_run_and_is_no_damaged_file(remote, monkeypatch, tmp_path):
    for name in ("x.tar", "x.parquet"):
        out = tmp_path / f"of {name}"
        with monkeypatch.context() as patched:
            patched.setattr(remote, "gap", 100_000)
            with pytest.raises(OSError, match=rf"remote://{name} cannot be read \(the connection was reset\)"):
                embed(f"remote://{name}", out, **{**SMALL, "shard_size": 20})
        assert not list(out.glob("part*"))
        assert embed(f"remote://{name}", out, resume=True, **{**SMALL, "shard_size": 20}).images == 20


class ServerDisconnectedError(ClientError):
    """What a client raises when the connection is lost, without a number."""


def of_status(status):
    error = ClientError(f"{status}, message")
    error.status = status
    return error


def no_file(cause):
    """What fsspec's http makes of every error."""
    error = FileNotFoundError("images/03.png")
    error.__cause__ = cause
    return error


LOST = {
    "timeout": TimeoutError(),
    "disconnected": ServerDisconnectedError(),
    "reset": ConnectionResetError(),
    "refused": ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    "unmounted": OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
    "no names": socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    "overloaded": of_status(503),
}
OF_THE_IMAGE = {"forbidden": of_status(403), "gone": of_status(404), "unknown": ClientError("odd")}


@pytest.mark.parametrize("make", [lambda error: error, no_file], ids=["itself", "as a cause"])
def test_what_is_lost_is_told_from_what_an_image_lacks(remote, monkeypatch, make):
    monkeypatch.setattr(remote, "unopened", "images/03.png")
    for name, error in (LOST | OF_THE_IMAGE).items():
        monkeypatch.setattr(remote, "refusal", make(error))
        with pytest.raises(OSError, match=r"remote://images/03\.png") as raised:
            read_bytes("remote://images/03.png")
        assert (raised.value.errno in FAILURES) == (name in LOST), name
        assert isinstance(raised.value, FileNotFoundError) == (make is no_file and name not in LOST), name


def test_a_server_that_fails_stops_the_run(remote, monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "unopened", "images/03.png")
    monkeypatch.setattr(remote, "refusal", no_file(of_status(503)))
    with pytest.raises(OSError, match=r"03\.png cannot be read .*503, message: 'remote://images/03\.png'\); see"):
        embed("remote://images", tmp_path / "out", **SMALL)
    assert not list((tmp_path / "out").glob("part*"))


def test_a_file_that_comes_in_pieces_is_read_whole(remote, monkeypatch, tmp_path):
    whole = remote.files["images/03.png"]
    read, asked = Failing.read, []

    def read_pieces(self, size=-1):
        asked.append(size)
        return read(self, min(size, 1000) if size >= 0 else size)

    monkeypatch.setattr(Failing, "read", read_pieces)
    assert read_bytes("remote://images/03.png") == whole and len(whole) > 3000
    with open_url("remote://images/03.png") as file:
        asked.clear()
        assert file.read(2500) == whole[:2500] and asked == [2500, 1500, 500]
        assert file.read(0) == b"" and file.read() == whole[2500:] and file.read(10) == b""


def write_table(file, **columns):
    parquet.write_table(pyarrow.table(columns), file)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    for name in ("tars/a.tar", "tars/notes.txt", "tables/b.PARQUET"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "bad.parquet").write_bytes(b"no parquet file")
    write_table(tmp_path / "none.parquet", id=[1], name=["x"])
    write_table(tmp_path / "two.parquet", a=[b"x"], b=[b"x"])
    write_table(tmp_path / "numbers.parquet", path=[1])
    refusals = {
        "empty": r"empty holds no images \(\.png, .*\)$",
        "tars": r"tars holds no images \(.*\); give its \.tar files as a pattern, such as .*/tars/\{000\.\.999\}\.tar$",
        "tables": r"give its \.parquet files as a pattern, such as .*/tables/\{000\.\.999\}\.parquet$",
        "tars/*.tar": r"\*\.tar does not exist: patterns are \{000\.\.999\} or \{a,b\} in quotes, not \*$",
        "{tars,tables}/*.parquet": r"\*\.parquet does not exist: patterns are \{000\.\.999\}",
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
