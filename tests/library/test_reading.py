"""Other people's files: every form is read, whatever its name; what is hostile or damaged is refused."""

import gzip
import io
import os
import pickle
import pickletools
import random
import struct
import tarfile
import tracemalloc
import zipfile

import pytest
import torch
from conftest import ARCHIVE
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from rotation_ssl.convert import read_checkpoint
from rotation_ssl.convert.reading import MAX_MEMBERS

NETWORK = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([0.5, -0.5]), "steps": torch.tensor(7)}
ZEROS = 50_000_000
ALLOWED = 10**6


def pickled(checkpoint, legacy=False):
    stream = io.BytesIO()
    torch.save(checkpoint, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def plain(name, content=b"", **fields):
    """A member of a tar archive with its content; fields of its header as they are."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    return member, content


def archived(*members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as archive:
        for member, content in members:
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


LEGACY = pickled({"epoch": 3, "network": NETWORK}, legacy=True)
FORMS = {
    "safetensors": save(NETWORK),
    "zip": pickled({"epoch": 3, "network": NETWORK}),
    "legacy": LEGACY,
    "archive of zip": archived(plain("run/model_net_epoch3", pickled({"epoch": 3, "network": NETWORK}))),
    "archive of legacy": archived(plain("./model_net_epoch3", LEGACY)),
}


def assert_equal(read, network=NETWORK):
    assert read.keys() == network.keys()
    for key, value in network.items():
        assert read[key].dtype == value.dtype and read[key].device.type == "cpu" and read[key].equal(value), key


def assert_refused(file, match, **arguments):
    with pytest.raises(ValueError, match=match) as caught:
        read_checkpoint(file, **arguments)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    """A function that writes bytes into a file and returns its path."""

    def write(content, name="checkpoint"):
        file = tmp_path / name
        file.write_bytes(content)
        return file

    return write


@pytest.mark.parametrize("form", FORMS)
def test_content_tells_the_form(write, form):
    for name in ("a", "a.safetensors", "a.pth", "a.tar.gz", "a.zip"):
        read = read_checkpoint(write(FORMS[form], name))
        assert_equal(read if form == "safetensors" else read["network"])
        assert form == "safetensors" or read["epoch"] == 3


def test_the_release_of_the_authors():
    checkpoint = read_checkpoint(ARCHIVE)
    assert checkpoint["epoch"] == 200 and len(checkpoint["network"]) == 62
    assert all(value.isfinite().all() and value.device.type == "cpu" for value in checkpoint["network"].values())


def authors_content():
    with tarfile.open(ARCHIVE) as archive:
        (member,) = [member for member in archive if member.isfile()]
        return archive.extractfile(member).read()


def as_python2(content):
    """A legacy checkpoint of Python 3 in the words of torch 0.2 on Python 2.

    Strings are bytes, storages are of CUDA's type, and the ordered dict is made of pairs, not filled afterwards.
    """
    stream, written = io.BytesIO(content), []
    for _ in range(5):  # magic number, version, system, the checkpoint, keys of the storages; then their bytes
        operations = list(pickletools.genops(stream))
        ends = [start for _, _, start in operations[1:]] + [stream.tell()]
        depth, in_pairs, first = 0, None, True
        for (operation, argument, start), end in zip(operations, ends, strict=True):
            code = content[start:end]
            depth += (operation.name == "MARK") - (operation.name in ("TUPLE", "SETITEMS", "APPENDS"))
            if operation.name == "GLOBAL" and argument == "torch FloatStorage":
                code = b"ctorch.cuda\nFloatStorage\n"
            elif operation.name == "GLOBAL" and argument == "collections OrderedDict":
                in_pairs = depth + 1
            elif operation.name == "EMPTY_TUPLE":  # of the ordered dict, still to be called with a list
                code = pickle.EMPTY_LIST
            elif operation.name == "REDUCE" and depth + 1 == in_pairs:
                code = b""
            elif operation.name == "BINUNICODE":
                # strings of 256 bytes and more, which no checkpoint of theirs has, would be another operation
                code = pickle.SHORT_BINSTRING + bytes([len(argument)]) + argument.encode("ascii")
                if depth == in_pairs:
                    code = (b"" if first else pickle.APPENDS) + pickle.EMPTY_LIST + pickle.MARK + code
                    first = False
            elif operation.name == "SETITEMS" and depth + 1 == in_pairs:
                code, in_pairs = pickle.APPENDS + pickle.APPENDS + pickle.TUPLE1 + pickle.REDUCE, None
            written.append(code)
    return b"".join(written) + stream.read()


def test_a_release_written_by_python_2(write):
    content = as_python2(authors_content())
    stream = io.BytesIO(content)
    names = [{operation.name for operation, _, _ in pickletools.genops(stream)} for _ in range(5)]
    assert {"SHORT_BINSTRING", "APPENDS"} <= names[3] and "BINUNICODE" not in set().union(*names)
    assert content.count(b"torch.cuda\nFloatStorage") == 1 and b"ctorch\nFloatStorage" not in content
    expected = read_checkpoint(ARCHIVE)
    for file in (write(content), write(archived(plain("NIN/model_net_epoch200", content)))):
        read = read_checkpoint(file)
        assert read["epoch"] == 200 and list(read["network"]) == list(expected["network"])
        assert_equal(read["network"], expected["network"])


def epochs(*numbers, folder="run/"):
    return [plain(f"{folder}model_net_epoch{n}", pickled({"epoch": n}, legacy=True)) for n in numbers]


def test_one_of_several_epochs(write):
    others = [plain("run", type=tarfile.DIRTYPE), plain("run/log.txt", b"a log"), plain("run/._model_net_epoch9", b"x")]
    file = write(archived(*others, *epochs(50, 200, 100)))
    assert read_checkpoint(file) == {"epoch": 200}
    assert [read_checkpoint(file, epoch)["epoch"] for epoch in (50, 100, 200)] == [50, 100, 200]
    told = assert_refused(file, "no checkpoint of epoch 7", epoch=7)
    assert all(f"run/model_net_epoch{n}" in told for n in (50, 100, 200))
    assert_refused(write(archived(*epochs(1), *epochs(1, folder="other/"))), "no one checkpoint; it has run/model_net_")


def test_files_of_other_names(write):
    assert_equal(read_checkpoint(write(archived(plain("weights.pth", LEGACY))))["network"])
    file = write(archived(*(plain(f"{i}.pth", LEGACY) for i in range(14))))
    assert_refused(file, r"no one checkpoint; it has 0\.pth, .*9\.pth and 4 more")
    assert_refused(write(archived()), "no one checkpoint; it has no files")
    # names are other people's, too
    assert_refused(write(archived(plain("a\nb", LEGACY), plain("c" * 10_000, LEGACY))), r"'a\\nb', c{100}$")


@pytest.mark.parametrize(
    "member",
    [
        plain("../model_net_epoch1", LEGACY),
        plain("run/../../model_net_epoch1", LEGACY),
        plain("/tmp/model_net_epoch1", LEGACY),
        plain("..\\model_net_epoch1", LEGACY),
        plain("model_net_epoch1", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        plain("model_net_epoch1", type=tarfile.LNKTYPE, linkname="model_net_epoch3"),
        plain("model_net_epoch1", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        plain("model_net_epoch1", type=tarfile.FIFOTYPE),
        # a terabyte of holes, in one byte
        plain("model_net_epoch1", b"0", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**12)}),
    ],
    ids=["parent", "deep parent", "absolute", "backslash", "symlink", "hardlink", "device", "fifo", "sparse"],
)
def test_members_that_are_no_files_inside_are_refused(write, member):
    match = "lies outside of it" if member[0].isfile() and member[1] == LEGACY else "neither a plain file nor a folder"
    for members in ([member], [*epochs(3), member], [member, *epochs(3)]):
        assert_refused(write(archived(*members)), match)


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.REGTYPE])
def test_too_many_members(write, kind):
    # what is passed over counts, too
    many = [plain(f".{i}", type=kind) for i in range(MAX_MEMBERS)]
    assert_refused(write(archived(*many, *epochs(1))), "more than 1000 members")
    assert read_checkpoint(write(archived(*many[1:], *epochs(1)))) == {"epoch": 1}


def test_a_chain_of_headers(write):
    # each announces the next: Python's reader calls itself for every one of them
    names = [plain("x", b"name\0", type=tarfile.GNUTYPE_LONGNAME)] * 2000
    assert_refused(write(archived(*names, *epochs(1))), "damaged")


def test_truncated_and_flipped_archives(write):
    content = archived(plain("model_net_epoch3", pickled({"network": NETWORK}, legacy=True)))
    for end in (*range(0, len(content), 9), *range(len(content) - 9, len(content))):
        assert_refused(write(content[:end]), "damaged")
    # gzip's checksum: what is not refused was read right
    for index in range(0, len(content), 7):
        file = write(content[:index] + bytes([content[index] ^ 16]) + content[index + 1 :])
        try:
            read = read_checkpoint(file)
        except ValueError as error:
            assert str(file) in str(error) and "\n" not in str(error)
        else:
            assert_equal(read["network"])


@pytest.fixture(scope="module")
def bombs():
    """Archives of a few thousand bytes that unpack to 50 MB."""
    zeros = bytes(ZEROS)
    return {
        "file": archived(plain("model_net_epoch1", zeros)),
        "passed over": archived(plain(".hidden", zeros), *epochs(1)),
        "behind the end": gzip.compress(gzip.decompress(archived(*epochs(1))) + zeros, 1),
        "pax header": archived(plain("x", zeros, type=tarfile.XHDTYPE), *epochs(1)),
        "long name": archived(plain("x", zeros, type=tarfile.GNUTYPE_LONGNAME), *epochs(1)),
        "no archive": gzip.compress(zeros, 1),
    }


@pytest.mark.parametrize("kind", ["file", "passed over", "behind the end", "pax header", "long name", "no archive"])
def test_bombs_in_archives(bombs, write, monkeypatch, kind):
    unpacked = []

    class Counted(gzip.GzipFile):
        def read(self, size=-1):
            block = super().read(size)
            unpacked.append(len(block))
            return block

    monkeypatch.setattr(gzip, "open", lambda stream: Counted(fileobj=stream))
    file = write(bombs[kind])
    assert file.stat().st_size < ZEROS / 100
    tracemalloc.start()
    try:
        assert_refused(file, "unpacks to more than the 1,000,000 bytes allowed", max_bytes=ALLOWED)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0 < sum(unpacked) <= ALLOWED + 1
    assert peak < 10 * ALLOWED


@pytest.fixture(scope="module")
def zip_bombs():
    """Zip archives of torch.save, compressed: what they hold, and ways to hide it."""
    content = pickled({"w": torch.zeros(ZEROS // 4)})
    deflated, bzipped = (recompressed(content, method) for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    # the directory at the end claims small sizes; an entry's stands 22 bytes before its name
    lying = bytearray(bzipped)
    for entry in zipfile.ZipFile(io.BytesIO(bzipped)).infolist():
        struct.pack_into("<L", lying, lying.rindex(entry.filename.encode()) - 22, min(entry.file_size, 1000))
    # torch's reader goes where the end record points, Python's takes the directory right before it
    small = io.BytesIO()
    with zipfile.ZipFile(small, "w") as archive:
        for entry in zipfile.ZipFile(io.BytesIO(content)).infolist():
            archive.writestr(entry.filename, b"x")
    start = struct.unpack("<L", small.getvalue()[-6:-2])[0]
    return {
        "deflated": deflated,
        "with other bytes behind": deflated + b"PK\5\6",
        "with two directories": deflated[:-22] + small.getvalue()[start:-22] + deflated[-22:],
        "of another compression": bytes(lying),
    }


def recompressed(content, method):
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(stream, "w", method) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("deflated", r"unpacks to 50,000,[\d,]+ bytes, more than the 1,000,000 allowed"),
        ("with other bytes behind", "BadZipFile"),
        ("with two directories", "BadZipFile"),
        ("of another compression", "compressed by method 12"),
    ],
)
def test_bombs_in_zip_archives(zip_bombs, write, kind, match):
    content = zip_bombs[kind]
    assert len(content) < ALLOWED / 10
    assert_refused(write(content), match, max_bytes=ALLOWED)
    assert_refused(write(archived(plain("model_net_epoch1", content))), match, max_bytes=ALLOWED)


def test_a_zip_archive_may_be_compressed(write):
    content = recompressed(FORMS["zip"], zipfile.ZIP_DEFLATED)
    assert_equal(read_checkpoint(write(content), max_bytes=10_000)["network"])


@pytest.mark.parametrize("form", FORMS)
def test_files_of_more_bytes_than_allowed(write, form):
    assert_refused(write(FORMS[form]), "more than the 60 (bytes )?allowed", max_bytes=60)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        # four bytes in the file, and 40 GB for whoever computes with it
        (torch.zeros(1).expand(10**10), r"contains tensors of 40,000,000,000 bytes"),
        (torch.empty(10**10, device="meta"), "without values"),
    ],
    ids=["expanded", "meta"],
)
def test_tensors_without_plain_values(write, tensor, match, legacy):
    assert_refused(write(pickled({"a": [{"w": (tensor,)}]}, legacy)), match)


def test_a_list_that_holds_itself(write):
    # {"l": [the list itself, and a tensor]}: nothing that walks it may do so for ever
    nested = [torch.ones(1)]
    nested.append(nested)
    read = read_checkpoint(write(pickled({"l": nested}, legacy=True)))
    assert read["l"][1] is read["l"]


def nested_key(depth):
    """{(((...()...))): 1} as a pickle."""
    return b"\x80\x02})" + b"\x85" * depth + b"K\x01s."


def legacy_of(pickled_checkpoint, names=b"\x80\x02]."):
    """A checkpoint file with this pickle in the place of the dict with the network."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    before = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system))
    return before + pickled_checkpoint + names


def zip_of(pickled_checkpoint, name="data.pkl"):
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(FORMS["zip"])) as source, zipfile.ZipFile(stream, "w") as target:
        for entry in source.infolist():
            path, is_it = entry.filename, entry.filename.endswith("data.pkl")
            target.writestr(path.replace("data.pkl", name), pickled_checkpoint if is_it else source.read(entry))
    return stream.getvalue()


@pytest.mark.parametrize("made", [legacy_of, zip_of, lambda content: zip_of(content, "DATA.PKL")])
def test_keys_of_nested_tuples(write, made):
    # ten times as many would crash Python, which hashes them
    assert_refused(write(made(nested_key(100_000))), "pickle has more than 50,000 tuples")
    ((key, value),) = read_checkpoint(write(made(nested_key(3)))).items()
    assert (key, value) == (((((),),),), 1)


@pytest.mark.parametrize("name", [".hidden", "model_net_epoch1"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_cannot_lead_behind_the_end_for_ever(write, name, form):
    header = tarfile.TarInfo(name)
    header.size = 10**15
    assert_refused(write(gzip.compress(header.tobuf(form) + bytes(1024))), "unpacks to more than the 1,073,741,824")


def test_every_pickle_of_a_legacy_checkpoint_is_counted(write):
    # the fifth has the names of the tensors, which torch reads as it reads the others
    content = legacy_of(b"\x80\x02}.", names=nested_key(100_000))
    assert_refused(write(content), "pickle has more than 50,000 tuples")


def test_lists_and_dicts_may_be_nested(write):
    lists = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    dicts = b"\x80\x02}" + b"K\x01}" * 100_000 + b"s" * 100_000 + b"."
    for content in (lists, dicts):
        assert len(read_checkpoint(write(legacy_of(content)))) == 1


def test_texts_of_a_pickle_are_told_without_control_characters(write):
    hostile = b"\x80\x02c\x1b[2Jevil\nname\n."
    told = assert_refused(write(legacy_of(hostile)), "could run code")
    assert told.isprintable()
    header = b'{"\x1b[2J": 5}'
    assert assert_refused(write(struct.pack("<Q", len(header)) + header), "damaged").isprintable()


class Runs:
    """Runs code when unpickled."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("in_archive", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["whole", "nested", "key"])
def test_pickles_that_would_run_code(write, tmp_path, where, legacy, in_archive):
    mark = tmp_path / "ran"
    for code, name in (
        (Runs(os.system, f"touch {mark}"), r"\w+\.system"),
        (Runs(pytest.fail, "the code ran"), r"\S+"),
        (Runs(exec, f"open({str(mark)!r}, 'w')"), "exec"),
    ):
        hostile = {"whole": code, "nested": {"network": NETWORK, "meta": [code]}, "key": {code: 1}}[where]
        content = pickled(hostile, legacy)
        file = write(archived(plain("model_net_epoch1", content)) if in_archive else content)
        assert_refused(file, rf"its pickle asks for {name}, which could run code")
        assert not mark.exists()


def test_a_bare_pickle_that_would_run_code(write):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert_refused(
            write(pickle.dumps(Runs(pytest.fail, "the code ran"), protocol)), "could run code|not a checkpoint"
        )


NONE = {
    "empty": b"",
    "text": b"a text\nof two lines\n",
    "zeros": bytes(1000),
    "noise": random.Random(0).randbytes(5000),
    "another pickle": pickle.dumps([1, 2]),
    "start of a zip": b"PK\x03\x04",
    "start of a gzip": b"\x1f\x8b",
    "cut safetensors": FORMS["safetensors"][:-1],
    "cut header of safetensors": FORMS["safetensors"][:20],
    "cut zip": FORMS["zip"][:-1],
    "cut legacy": LEGACY[:-1],
    "cut pickle": LEGACY[:100],
    "tar without gzip": gzip.decompress(FORMS["archive of zip"]),
    "a text in an archive": archived(plain("model_net_epoch1", b"a text")),
}


@pytest.mark.parametrize("kind", NONE)
def test_what_is_no_checkpoint(write, kind):
    assert_refused(write(NONE[kind]), "damaged")


def test_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.pth"):
        assert_refused(path, "there is no checkpoint file")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "checkpoint"


@given(
    end=st.none() | st.integers(0, len(LEGACY)),
    flips=st.lists(st.tuples(st.integers(0, len(LEGACY) - 1), st.integers(0, 7)), max_size=4),
)
def test_damaged_pickles_are_read_or_refused(damaged, end, flips):
    content = bytearray(LEGACY)
    for index, bit in flips:
        content[index] ^= 1 << bit
    damaged.write_bytes(content[:end])
    try:
        read_checkpoint(damaged)
    except ValueError as error:
        assert str(damaged) in str(error) and "\n" not in str(error)
