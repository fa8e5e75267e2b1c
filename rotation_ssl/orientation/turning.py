"""Picture files: read as they are shown, and turned by their EXIF orientation or by their pixels."""

import contextlib
import io
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageFile, ImageOps, JpegImagePlugin

from rotation_ssl.files import replace_file
from rotation_ssl.images import OVERSIZE, read_image
from rotation_ssl.messages import first_line
from rotation_ssl.orientation.exif import (
    ORIENTATION,
    PIXEL_FORMATS,
    not_written,
    read_orientation,
    turned,
    write_orientation,
)
from rotation_ssl.orientation.metadata import keep_chunks, loss_of_jpeg, upright_xmp

# what describes a picture in a TIFF: the other tags, such as the places of its strips, are of its old bytes
TIFF_TAGS = {
    ExifTags.Base.DocumentName, ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model,
    ExifTags.Base.Software, ExifTags.Base.DateTime, ExifTags.Base.Artist, ExifTags.Base.HostComputer,
    ExifTags.Base.Copyright,
}  # fmt: skip
# compressions of TIFF that lose something at each writing
_LOSSY = ("jpeg", "tiff_jpeg", "webp")
_CLOCKWISE = {1: Image.Transpose.ROTATE_270, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_90}


@dataclass(frozen=True)
class Picture:
    """A picture file: its ``image`` as viewers show it, RGB, reduced to little more than is looked at, and its EXIF
    orientation, 1 to 8.
    """

    path: Path
    image: Image.Image
    exif: int


def open_picture(path: Path, size: int) -> Picture:
    """Read a picture to look at squares of ``size`` pixels: large ones are decoded at a part of their size.

    Raises:
        ValueError: it does not exist, cannot be read or does not decode; the error names the file.
    """
    side = OVERSIZE * size
    try:
        shown = read_image(path, side)
        with Image.open(path) as image:
            exif = read_orientation(image)
    except OSError as error:
        # a disk that fails at one picture may give the next one
        raise ValueError(str(error)) from error
    if (factor := min(shown.size) // side) > 1:
        shown = shown.reduce(factor)
    return Picture(path, shown, exif)


def turn_tag(path: Path, exif: int, quarters: int) -> bytes:
    """The file's bytes with the EXIF orientation that shows it turned clockwise by so many quarters.

    Raises:
        ValueError: as :func:`rotation_ssl.orientation.exif.write_orientation`; the error names the file.
    """
    try:
        return write_orientation(path.read_bytes(), turned(exif, quarters))
    except ValueError as error:
        raise ValueError(f"{path} cannot get an EXIF orientation: {error}") from error


def turn_pixels(path: Path, quarters: int) -> bytes:
    """The file's bytes with its pixels as they are to be shown, turned clockwise by so many quarters, without the tag.

    JPEG files are encoded again, with their own quantisation; WebP files become lossless. Colour profile, resolution,
    XMP, the text of PNG files and the other EXIF tags are kept, of TIFF files those that describe the picture. EXIF
    tags of the picture's size are given the new one, and the EXIF thumbnail, which would be turned, is left out.

    Raises:
        ValueError: a file of several frames, of a format or colours that cannot be written as they were, a JPEG file
            with a second image, a video, IPTC or XMP that Pillow does not write, a TIFF file with an EXIF block or
            lossy compression, or one that does not decode; the error names the file.
    """
    try:
        content = path.read_bytes()
        with Image.open(path) as image:
            form = image.format or ""
            # an MPO file is a JPEG file of several frames
            if form not in (*PIXEL_FORMATS, "MPO"):
                raise ValueError(not_written(form))
            if loss := _loss(image, content):
                raise ValueError(f"{loss}: write its EXIF orientation instead")
            options = _options(image, form)
            image.load()
            shown, exif = ImageOps.exif_transpose(image), image.getexif()
            exif.pop(ORIENTATION, None)
            result = shown.transpose(_CLOCKWISE[quarters % 4]) if quarters % 4 else shown
            if form == "TIFF":
                if ExifTags.IFD.Exif in exif or ExifTags.IFD.GPSInfo in exif:
                    # libtiff, which Pillow calls for compressed files, takes no tags that are lists of tags
                    raise ValueError("its EXIF block would be lost: write its EXIF orientation instead")
                for tag in set(exif) - TIFF_TAGS:
                    del exif[tag]
                options["exif"] = exif
            elif len(exif) and form in ("JPEG", "PNG", "WEBP"):
                _set_size(exif, result.size)
                options["exif"] = exif.tobytes()
            stream = io.BytesIO()
            result.save(stream, form, **options)
        written = stream.getvalue()
        if options.get("xmp", b"") not in written:
            raise ValueError("its XMP would be lost: install Pillow 11 or newer, or write its EXIF orientation instead")
        return keep_chunks(written, content) if form == "PNG" else written
    except Exception as error:
        # what Pillow's readers and writers raise is not one family
        raise ValueError(f"the pixels of {path} cannot be turned: {first_line(error)}") from error


def _set_size(exif: Image.Exif, size: tuple[int, int]) -> None:
    """Give the EXIF tags of a picture's size, where there are some, the size that is written."""
    base = ExifTags.Base
    found: list[tuple[Any, tuple[int, int]]] = [(exif, (base.ImageWidth, base.ImageLength))]
    if ExifTags.IFD.Exif in exif:
        found.append((exif.get_ifd(ExifTags.IFD.Exif), (base.ExifImageWidth, base.ExifImageHeight)))
    for tags, names in found:
        for tag, side in zip(names, size, strict=True):
            if tag in tags:
                tags[tag] = side


def _loss(image: ImageFile.ImageFile, content: bytes) -> str | None:
    """What a file would lose if Pillow wrote its turned pixels, None if nothing."""
    if getattr(image, "n_frames", 1) > 1:
        return f"of its several {'pages' if image.format == 'TIFF' else 'frames'} only one would be kept"
    if image.mode == "CMYK":
        return f"CMYK pixels of a {image.format} file are not written"
    return _change_by_writing(image) or (loss_of_jpeg(image, content) if image.format == "JPEG" else None)


def _options(image: ImageFile.ImageFile, form: str) -> dict[str, Any]:
    """What Pillow is to write besides pixels and EXIF, and how."""
    options: dict[str, Any] = {key: image.info[key] for key in ("icc_profile", "dpi") if key in image.info}
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        options |= {"qtables": image.quantization, "subsampling": JpegImagePlugin.get_sampling(image)}
    if form == "WEBP":
        options |= {"lossless": True}
    if form == "TIFF":
        options |= {"compression": image.info.get("compression")}
    if form in ("JPEG", "WEBP") and (xmp := upright_xmp(image)):
        options |= {"xmp": xmp}
    return options


def _change_by_writing(image: ImageFile.ImageFile) -> str | None:
    """How Pillow would change the pixels of a PNG or TIFF file by writing them, None if it does not.

    It is asked before ``image.load()``, which clears the tile.
    """
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(ExifTags.Base.BitsPerSample, (8,)))
    # Pillow opens colours of 16 bits in modes of 8; for PNG files only the tile tells
    if image.format == "PNG" and any(";16" in str(tile[3]) for tile in image.tile):
        bits = 16
    if bits > 8 and image.mode[0] not in "IF":
        return f"its {bits} bits per colour would become 8"
    # it does not scale grey of 12 bits to the 16 that it writes
    if image.mode.startswith("I;16") and bits != 16:
        return f"its {bits}-bit grey would become darker"
    # it inverts these two modes alone
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0 and image.mode not in ("1", "L"):
        return "its white is zero, so it would become a negative"
    if image.format == "TIFF" and (compression := image.info.get("compression")) in _LOSSY:
        return f"its {compression} compression would lose quality again"
    return None


def write_picture(source: Path, target: Path, content: bytes, keep_times: bool) -> None:
    """Write a turned picture whole or not at all; one in place keeps its owner.

    It has the permissions of its source and, where the system has them, the extended attributes, such as ratings.

    Args:
        source: the picture that was turned.
        target: the file to write, the source itself or one in an existing folder.
        content: the file's bytes.
        keep_times: give it the times of its source as well.

    Raises:
        ValueError: the file is there and read-only.
        OSError: it cannot be written.
    """
    before = source.stat()
    if target.exists() and not target.stat().st_mode & 0o222:
        raise ValueError(f"{target} is read-only: make it writable, or give -o DIR")

    def write(unfinished: Path) -> None:
        unfinished.write_bytes(content)
        if target.exists() and hasattr(os, "chown"):
            replaced = target.stat()
            # only the system's administrator may give a file to others
            with contextlib.suppress(OSError):
                os.chown(unfinished, replaced.st_uid, replaced.st_gid)
        # before the file may become read-only
        _copy_attributes(source, unfinished)
        shutil.copymode(source, unfinished)
        if keep_times:
            os.utime(unfinished, ns=(before.st_atime_ns, before.st_mtime_ns))

    # a link stays one: what it leads to is replaced
    replace_file(target.resolve(), write)


def _copy_attributes(source: Path, target: Path) -> None:
    """Copy extended attributes, as shutil.copystat does; those that the system or the disk refuses are left out."""
    # Python has these functions on Linux alone
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        for name in os.listxattr(source):
            with contextlib.suppress(OSError):
                os.setxattr(target, name, os.getxattr(source, name))
