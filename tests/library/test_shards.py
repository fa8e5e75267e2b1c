import errno
import io
import itertools
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from many_images import tar_of

from rotation_ssl.shards import expand_braces, tar_members


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("", [""]),
        ("x-{8..11}.tar", ["x-8.tar", "x-9.tar", "x-10.tar", "x-11.tar"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{0..010}", [f"{number:03d}" for number in range(11)]),
        ("{0..2}", ["0", "1", "2"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("x{,-more}.tar", ["x.tar", "x-more.tar"]),
        ("s3://bucket/{00..01}.tar", ["s3://bucket/00.tar", "s3://bucket/01.tar"]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..9", "not closed"),
        ("0..9}", "not closed"),
        ("{{0..9}}", "not closed or are nested"),
        ("{a,{0..9}}", "not closed or are nested"),
        ("{}", "neither a range"),
        ("{a}", "neither a range"),
        ("{a..c}", "neither a range"),
        ("{0..9..3}", "neither a range"),
        ("{0..2,5}", "neither a range"),
        ("{9..0}", r"counts down; write \{0\.\.9\}"),
        ("{0..99999999999}", "more than 10,000,000 names"),
        ("{0..9999}{0..9999}", "more than 10,000,000 names"),
    ],
)
def test_malformed_braces(pattern, message):
    with pytest.raises(ValueError, match=message):
        expand_braces(pattern)


@given(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), max_size=5),
            st.tuples(st.integers(0, 200), st.integers(0, 5), st.integers(0, 4)),
            st.lists(st.text("abc-", max_size=3), min_size=2, max_size=3),
        ),
        max_size=4,
    )
)
def test_braces_are_nested_loops(pieces):
    pattern, choices = "", []
    for piece in pieces:
        if isinstance(piece, str):
            pattern, one = pattern + piece, [piece]
        elif isinstance(piece, tuple):
            first, more, width = piece
            pattern += f"{{{first:0{width}d}..{first + more:0{width}d}}}"
            one = [f"{number:0{width}d}" for number in range(first, first + more + 1)]
        else:
            pattern, one = pattern + "{" + ",".join(piece) + "}", piece
        choices.append(one)
    assert expand_braces(pattern) == ["".join(names) for names in itertools.product(*choices)]


IMAGES = [(f"folder/{number}.{suffix}", bytes([number]) * 700) for number, suffix in enumerate(("png", "jpg", "JPEG"))]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_members(mode, tmp_path):
    file = tmp_path / "x.tar"
    file.write_bytes(tar_of([*IMAGES, ("notes.txt", b"text"), ("folder/.hidden.png", b"x")], mode))
    assert list(tar_members(file)) == IMAGES
    with file.open("rb") as stream:
        assert list(tar_members(stream)) == IMAGES
        assert not stream.closed


def test_long_and_odd_names():
    names = [f"{'long' * 60}.png", "../up.png", "/root.png", "\u00e9 \n.png"]
    assert [name for name, _ in tar_members(io.BytesIO(tar_of([(name, b"x") for name in names])))] == names


def test_only_regular_files():
    members = [(tarfile.TarInfo(f"{kind!r}.png"), b"") for kind in (b"1", b"2", b"3", b"4", b"5", b"6")]
    for info, _ in members:
        info.type = info.name[2:3].encode()
        info.linkname = "/etc/hostname"
    assert list(tar_members(io.BytesIO(tar_of([*members, *IMAGES])))) == IMAGES


def test_large_members():
    content = tar_of([("large.png", b"x" * 1001), ("small.png", b"x" * 1000)])
    with pytest.raises(ValueError, match=r"^tar of mine: member large\.png has 1,001 bytes, more than the 1,000"):
        list(tar_members(io.BytesIO(content), max_bytes=1000, name="of mine"))
    skipped = {}
    assert [name for name, _ in tar_members(io.BytesIO(content), skipped, 1000)] == ["small.png"]
    assert skipped == {"large.png": "large.png has 1,001 bytes, more than the 1,000 allowed"}


def read_until_cut(content):
    """What can be read, and whether the rest is told to be damaged."""
    read = []
    try:
        for member in tar_members(io.BytesIO(content), name="x"):
            read.append(member)
    except ValueError as error:
        assert str(error).startswith("tar x is damaged, cut or no tar file")
        return read, True
    return read, False


def test_a_tar_that_is_cut_gives_what_is_whole():
    """Cut anywhere, at the boundary of a member too: never a wrong member, and never a quiet end."""
    content, member = tar_of(IMAGES), 512 + 1024
    for length in [*range(0, 3 * member + 512, 97), *range(0, 3 * member + 512, 512), 3 * member + 511]:
        # a member is there if its bytes are: what pads them to blocks of 512 may lack
        whole = sum(member * number + 512 + 700 <= length for number in range(3))
        assert read_until_cut(content[:length]) == (IMAGES[:whole], True), length
    assert read_until_cut(content[: 3 * member + 512]) == (IMAGES, False)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_that_is_cut(mode):
    content = tar_of(IMAGES, mode)
    for length in range(0, len(content), 7):
        read, cut = read_until_cut(content[:length])
        # only the checksums of the compression may lack
        assert read == IMAGES[: len(read)] and (cut or (len(read) == 3 and length > len(content) - 80))


def test_a_damaged_header_and_other_files(tmp_path):
    content = bytearray(tar_of(IMAGES))
    content[512 + 1024 + 5] ^= 1
    members = tar_members(io.BytesIO(bytes(content)))
    assert next(members) == IMAGES[0]
    with pytest.raises(ValueError, match=r"damaged.*bad checksum"):
        next(members)
    (tmp_path / "x.tar").write_bytes(b"no tar file" * 200)
    with pytest.raises(ValueError, match=r"x\.tar is damaged, cut or no tar file"):
        list(tar_members(tmp_path / "x.tar"))
    with pytest.raises(ValueError, match=r"y\.tar does not exist"):
        list(tar_members(tmp_path / "y.tar"))
    assert list(tar_members(io.BytesIO(tar_of([])))) == []


def test_a_header_cannot_fill_the_memory():
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
    with pytest.raises(ValueError, match="a header of 8,589,934,592 bytes"):
        list(tar_members(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 5120)))


def test_a_member_cannot_lead_behind_the_end_for_ever():
    """A header of a size that no file has; its bytes are not there."""
    header = tarfile.TarInfo("notes.txt")
    header.size = 2**40
    content = header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    with pytest.raises(ValueError, match="a member of 1,099,511,627,776 bytes"):
        list(tar_members(io.BytesIO(content), name="x.tar"))


@pytest.mark.parametrize("name", ["notes.txt", "a.png"])
def test_an_extended_header_cannot_lead_there_either(name):
    header = tarfile.TarInfo(name)
    header.pax_headers = {"size": str(10**15)}
    content = header.tobuf(tarfile.PAX_FORMAT) + bytes(1024)
    with pytest.raises(ValueError, match="a member of 1,000,000,000,000,000 bytes"):
        list(tar_members(io.BytesIO(content), {}, name="x.tar"))


def test_a_chain_of_headers_is_an_error():
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 8
    block = long_name.tobuf(tarfile.GNU_FORMAT) + b"name.png".ljust(512, b"\0")
    with pytest.raises(ValueError, match=r"x\.tar is damaged"):
        list(tar_members(io.BytesIO(block * 3000), name="x.tar"))


class Failing(io.BytesIO):
    """A disk that fails after so many bytes."""

    def read(self, size=-1):
        if self.tell() >= 4096:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


def test_a_disk_that_fails_is_not_a_damaged_tar(tmp_path):
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w") as archive:
        for name in "abcdefghij":
            member = tarfile.TarInfo(f"{name}.png")
            member.size = 4096
            archive.addfile(member, io.BytesIO(bytes(4096)))
    with pytest.raises(OSError, match="Input/output error"):
        list(tar_members(Failing(file.read_bytes()), name="x.tar"))
