"""What picture files hold besides pixels and EXIF: what a file of turned pixels keeps, and what it would lose."""

import re
import zlib

from PIL import Image

from rotation_ssl.orientation.exif import png_chunk, png_chunks

_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_LONG_XMP = b"http://ns.adobe.com/xmp/extension/\0"
_XMP_ORIENTATION = re.compile(
    rb"""tiff:Orientation\s*=\s*(["'])\s*[0-9]\s*\1|<tiff:Orientation>\s*[0-9]\s*</tiff:Orientation>"""
)
# those of a JPEG file that stand in no segment's data: zero is stuffed, 01 and D0 to D7 have no length
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
# the chunks of a PNG file that say nothing of its size or of how its pixels are stored, and that Pillow drops
_PNG_KEPT = {b"cHRM", b"cICP", b"gAMA", b"sRGB", b"tIME", b"tEXt", b"zTXt", b"iTXt"}
_PNG_HEADER = 33  # bytes: the signature and IHDR


def loss_of_jpeg(image: Image.Image, content: bytes) -> str | None:
    """What a JPEG file would lose if Pillow wrote it, None if nothing.

    Args:
        image: the file, opened.
        content: its bytes.
    """
    # Pillow shows the first picture alone of an Ultra HDR file, and of none what stands after it
    if "mp" in image.info or content[_jpeg_end(content) :].strip(b"\0\r\n\t "):
        return "it holds more than its image, such as a second one or a video, which would be lost"
    if image.info.get("photoshop"):
        return "its IPTC or Photoshop block would be lost"
    if any(segment.startswith(_LONG_XMP) for _, segment in getattr(image, "applist", [])):
        return "its XMP, which is longer than a segment, would be lost"
    return None


def upright_xmp(image: Image.Image) -> bytes:
    """The XMP of an opened JPEG or WebP file, without an orientation; empty if it has none."""
    # Pillow puts that of JPEG files into the info only in newer versions
    segments = [data[len(_XMP) :] for _, data in getattr(image, "applist", []) if data.startswith(_XMP)]
    xmp: bytes = segments[0] if segments else image.info.get("xmp", b"")
    return _XMP_ORIENTATION.sub(b"", xmp)


def keep_chunks(written: bytes, content: bytes) -> bytes:
    """A PNG file as Pillow wrote it, with the text, colour and time chunks of the original, without an orientation.

    Raises:
        ValueError: EXIF tags in a text chunk that Pillow does not read, or a damaged chunk.
    """
    kept = b"".join(_kept(kind, content[start:end]) for kind, start, end in png_chunks(content))
    return written[:_PNG_HEADER] + kept + written[_PNG_HEADER:]


def _kept(kind: bytes, chunk: bytes) -> bytes:
    """A chunk as it is to be written: most as they are, XMP without its orientation; empty if it is left out."""
    if kind not in _PNG_KEPT:
        return b""
    keyword, _, rest = chunk[8:-4].partition(b"\0")
    if keyword == b"Raw profile type exif":
        return b""  # Pillow has read it, and writes it as an eXIf chunk
    if keyword == b"Raw profile type APP1":
        raise ValueError("the EXIF tags in its text would be lost: write its EXIF orientation instead")
    if kind != b"iTXt" or keyword != b"XML:com.adobe.xmp":
        return chunk
    language, translated, text = rest[2:].split(b"\0", 2)
    xmp = zlib.decompress(text) if rest[0] else text
    upright = _XMP_ORIENTATION.sub(b"", xmp)
    if upright == xmp:
        return chunk
    return png_chunk(kind, b"\0".join((keyword, b"\0\0" + language, translated, upright)))


def _jpeg_end(content: bytes) -> int:
    """Where the image of a JPEG file ends, after its last marker; that of the file if it has none."""
    at = 2
    while found := _JPEG_MARKER.search(content, at):
        at = found.end()
        if found[0] == b"\xff\xd9":
            return at
        at += int.from_bytes(content[at : at + 2], "big")
    return len(content)
