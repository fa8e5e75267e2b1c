"""The EXIF orientation of an image file: what it means, and how to write it without touching anything else.

Only the tag changes: pixels, the other tags and all other parts of the file stay as they are, byte by byte.
"""

import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from rotation_ssl.images import EXIF_ERRORS

ORIENTATION = 0x0112  # the tag's number
PIXEL_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")  # Pillow's names of the formats whose pixels can be turned
_SHORT, _LONG = 3, 4  # types of values
_SIZES = {_SHORT: "H", _LONG: "I"}
# one quarter turn clockwise of what is shown: without a mirror 1 upright, 6, 3, 8; with one 2, 7, 4, 5
_CLOCKWISE = {1: 6, 6: 3, 3: 8, 8: 1, 2: 7, 7: 4, 4: 5, 5: 2}
_JPEG_MOST = 0xFFFF - 2  # bytes in one segment


def turned(orientation: int, quarters: int) -> int:
    """The orientation tag (1 to 8) that shows a picture of ``orientation`` turned clockwise by so many quarters."""
    for _ in range(quarters % 4):
        orientation = _CLOCKWISE[orientation]
    return orientation


def read_orientation(image: Image.Image) -> int:
    """The orientation tag of an opened image, 1 to 8; 1, which shows it as it is stored, without a valid one."""
    try:
        found = image.getexif().get(ORIENTATION)
    except EXIF_ERRORS:
        return 1
    return found if found in _CLOCKWISE else 1


def write_orientation(content: bytes, orientation: int) -> bytes:
    """A JPEG, PNG, WebP or TIFF file with another orientation tag.

    Args:
        content: the whole file.
        orientation: 1 to 8.

    Raises:
        ValueError: another format, or a file whose structure or EXIF block is damaged; the error says what to do.
    """
    if orientation not in _CLOCKWISE:
        raise ValueError(f"orientation must be 1 to 8, got {orientation}")
    try:
        if content[:2] == b"\xff\xd8":
            return _jpeg(content, orientation)
        if content[:8] == b"\x89PNG\r\n\x1a\n":
            return _png(content, orientation)
        if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            return _webp(content, orientation)
        if content[:4] in (b"II*\0", b"MM\0*"):
            return _tiff(content, orientation)
    except (struct.error, IndexError) as error:
        raise ValueError("its EXIF block or its structure is damaged: turn its pixels instead") from error
    if (form := _format(content)) in PIXEL_FORMATS:
        raise ValueError("its format has no EXIF orientation that can be written: turn its pixels instead")
    raise ValueError(not_written(form))


def not_written(form: str) -> str:
    """The error about a picture of a format that has no writer here; ``form`` is Pillow's name of it, or empty."""
    return (
        f"pictures of {f'the format {form}' if form else 'its format'} are not written: convert it to JPEG or PNG first"
    )


def _format(content: bytes) -> str:
    """Pillow's name of the format of a file, empty if it does not know it."""
    if content[:2] == b"BM":
        return "BMP"
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.format or ""
    except Exception:
        # what Pillow's readers raise is not one family
        return ""


def _tiff(content: bytes, orientation: int) -> bytes:
    """A TIFF structure with another orientation.

    The tag is changed in place or, where there is none, its first list of tags is copied to the end, with the tag:
    nothing that other tags point to moves.
    """
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None:
        raise struct.error("neither byte order")
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    entries = [content[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    following = content[start + 2 + 12 * count : start + 6 + 12 * count]
    if len(following) != 4 or start < 8:
        raise struct.error("the list of tags ends outside")
    for number, entry in enumerate(entries):
        tag, kind, values = struct.unpack_from(f"{order}HHI", entry)
        if tag == ORIENTATION and kind in _SIZES and values == 1:
            at = start + 2 + 12 * number + 8
            value = struct.pack(f"{order}{_SIZES[kind]}", orientation)
            return content[:at] + value + content[at + len(value) :]
    entries = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] != ORIENTATION]
    entries.append(struct.pack(f"{order}HHIHH", ORIENTATION, _SHORT, 1, orientation, 0))
    entries.sort(key=lambda entry: struct.unpack_from(f"{order}H", entry)[0])
    even = content + b"\0" * (len(content) % 2)
    header = even[:4] + struct.pack(f"{order}I", len(even))
    return header + even[8:] + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + following


def _new_block(orientation: int) -> bytes:
    """A TIFF structure that has this tag alone."""
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, ORIENTATION, _SHORT, 1, orientation, 0, 0)


def _jpeg(content: bytes, orientation: int) -> bytes:
    name, at, insert = b"Exif\0\0", 2, 2
    while content[at : at + 2] and content[at] == 0xFF and content[at + 1] != 0xDA:
        marker = content[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        (length,) = struct.unpack_from(">H", content, at + 2)
        end = at + 2 + length
        if marker == 0xE1 and content[at + 4 : at + 10] == name:
            return content[:at] + _segment(name + _tiff(content[at + 10 : end], orientation)) + content[end:]
        if marker == 0xE0 and at == 2:
            insert = end
        at = end
    if content[at : at + 2] != b"\xff\xda":
        raise struct.error("no image data")
    return content[:insert] + _segment(name + _new_block(orientation)) + content[insert:]


def _segment(payload: bytes) -> bytes:
    if len(payload) > _JPEG_MOST:
        raise ValueError("its EXIF block has no room for the orientation: turn its pixels instead")
    return b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload


def _png(content: bytes, orientation: int) -> bytes:
    image_data = 0
    for kind, start, end in png_chunks(content):
        # it may come after the image
        if kind == b"eXIf":
            block = _tiff(content[start + 8 : end - 4], orientation)
            return content[:start] + png_chunk(kind, block) + content[end:]
        if kind == b"IDAT":
            image_data = image_data or start
    if not image_data:
        raise struct.error("no image data")
    return content[:image_data] + png_chunk(b"eXIf", _new_block(orientation)) + content[image_data:]


def png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk of a PNG file up to IEND, and where the chunk starts and ends."""
    start = 8
    while (kind := content[start + 4 : start + 8]) and kind != b"IEND":
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        yield kind, start, end
        start = end


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file, with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _webp(content: bytes, orientation: int) -> bytes:
    chunks: list[tuple[bytes, bytes]] = []
    at = 12
    while at + 8 <= len(content):
        (length,) = struct.unpack_from("<I", content, at + 4)
        data = content[at + 8 : at + 8 + length]
        if len(data) != length:
            raise struct.error("a chunk ends outside")
        chunks.append((content[at : at + 4], data))
        at += 8 + length + length % 2
    if not chunks:
        raise struct.error("no chunks")
    if chunks[0][0] != b"VP8X":
        with Image.open(io.BytesIO(content)) as image:
            size = b"".join(struct.pack("<I", side - 1)[:3] for side in image.size)
            chunks.insert(0, (b"VP8X", bytes([0x10 if image.mode == "RGBA" else 0, 0, 0, 0]) + size))
    features = chunks[0][1]
    chunks[0] = (b"VP8X", bytes([features[0] | 0x08]) + features[1:])
    found = [number for number, (kind, _) in enumerate(chunks) if kind == b"EXIF"]
    if found:
        block = chunks[found[0]][1]
        prefix = b"Exif\0\0" if block.startswith(b"Exif\0\0") else b""
        chunks[found[0]] = (b"EXIF", prefix + _tiff(block[len(prefix) :], orientation))
    else:
        chunks.append((b"EXIF", _new_block(orientation)))
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
