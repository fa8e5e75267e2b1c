"""Image files -> batches that a backbone takes."""

import contextlib
import errno
import io
import os
import posixpath
import struct
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps

from rotation_ssl.progress import progress

#: Also suffixes of image files once :func:`register_heif` was called.
HEIF_SUFFIXES = (".heic", ".heif")
#: Suffixes of image files, in lower case; upper case is accepted too.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".tif", ".tiff")
#: Folders where a NAS or macOS keeps thumbnails and metadata, besides those whose name begins with a dot.
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX")
#: Errors of a disk or a network that fails, not of a file that is broken.
FAILURES = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ENODEV", "EBUSY", "ENOMEM", "EMFILE", "ENFILE", "EPIPE", "ENOTCONN", "ETIMEDOUT",
        "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENETUNREACH", "ENETDOWN", "EHOSTUNREACH", "EHOSTDOWN",
    )
    if hasattr(errno, name)  # not every platform has all of them
}  # fmt: skip
#: What Pillow raises on an EXIF block that it cannot read; such an image is upright.
EXIF_ERRORS = (SyntaxError, ValueError, struct.error)
#: Large JPEGs are decoded with a shorter side of at least this many times the side of the square that is used.
OVERSIZE = 2
_LONGEST = 8  # longer over shorter side, at most, of what is resized
_BITS_PER_SAMPLE = 258  # a tag of TIFF
_PHOTOMETRIC = 262  # tag of TIFF: 0 where white is zero


def read_image(file: Path | IO[bytes] | Image.Image, min_side: int = 0) -> Image.Image:
    """One image as RGB of 8 bits, whatever its mode, upright as its EXIF orientation says.

    Grey values of more bits are scaled by what the file can hold: 65535 of a 16-bit image becomes 255.

    Args:
        file: a path, an open file, or an image that was opened already.
        min_side: decode a large JPEG at 1/2, 1/4 or 1/8 of its size as long as its shorter side keeps this many pixels;
            0: at its own size.

    Raises:
        ValueError: it does not exist, does not decode, has more pixels than Pillow reads, or holds 32-bit integers or
            floats, whose range is not known; the error names the file.
        OSError: one of :data:`FAILURES`: the disk or the network failed, and the image may be good.
    """
    try:
        if isinstance(file, Path) and not file.is_file() and file.exists():
            # opening a named pipe would wait for whoever writes to it
            raise ValueError("it is not a regular file")
        with file if isinstance(file, Image.Image) else Image.open(file) as image:
            if min_side:
                # of JPEG alone, which leaves out high frequencies at a fraction of the work; it keeps the aspect
                scale = max(1, min(image.size) // min_side)
                image.draft(None, (image.width // scale, image.height // scale))
            image.load()
            # Pillow raises at an EXIF block without a header once, and then takes it for an empty one
            with contextlib.suppress(*EXIF_ERRORS):
                image.getexif()
            # exif_transpose has read the orientation; it would rewrite the other tags, and fail at a damaged one
            image.info.pop("exif", None)
            # of TIFFs whose white is zero Pillow inverts those of 8 bits alone
            is_negative = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
            white, upright = _white(image), ImageOps.exif_transpose(image)
            if white is not None:
                return _to_rgb(upright if white == 255 else _to_8_bits(upright, white, is_negative))
    except FileNotFoundError as error:
        raise ValueError(f"image {file} does not exist") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ValueError(
            f"image {file} has more than {most} million pixels, which are not read; make it smaller"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FAILURES:
            raise OSError(error.errno, f"image {file} cannot be read, try again: {error.strerror}") from error
        # what Pillow's many readers raise on damaged files is not one family
        raise ValueError(f"image {file} does not decode ({error}); replace or remove it") from error
    kind = "floats" if upright.mode == "F" else "32-bit or signed integers"
    raise ValueError(f"image {file} holds {kind} (mode {upright.mode}), whose range is not known; convert it to 8 bits")


@contextlib.contextmanager
def large_images_allowed() -> Iterator[None]:
    """Without Pillow's warning of images of many pixels: those of large photographs are only looked at.

    Filters of warnings are those of the process: with several threads, one may undo another's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def register_heif() -> bool:
    """Have Pillow read HEIC and HEIF files if pillow-heif is installed (extra `heif`); returns whether it is.

    pillow-heif shows them upright, and says that they have no EXIF orientation.
    """
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


class NamedBytes(io.BytesIO):
    """The bytes of an image file; errors, Pillow's too, call it by its name."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.called = name

    def __repr__(self) -> str:
        return self.called


def image_suffixes() -> set[str]:
    """The suffixes of image files, in lower case: those of HEIF too where Pillow reads it."""
    return {*IMAGE_SUFFIXES, *(suffix for suffix in HEIF_SUFFIXES if suffix in Image.registered_extensions())}


def is_image_name(name: str) -> bool:
    """Whether a file name is that of an image: it ends in one of :func:`image_suffixes`, and begins with no dot."""
    suffix = posixpath.splitext(name)[1].lower()
    # the set is built for the other names alone: folders have millions of images
    return not name.startswith(".") and (suffix in IMAGE_SUFFIXES or suffix in image_suffixes())


def is_searched(name: str) -> bool:
    """Whether a folder inside another one is searched: hidden ones, such as .Trash-1000, and system folders are not."""
    return not name.startswith(".") and name not in SYSTEM_FOLDERS


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, sorted by path.

    Files whose name begins with a dot are skipped, and so are hidden and system folders below the folder:
    see :func:`is_searched`.

    Raises:
        ValueError: no such folder, or none in it.
        OSError: the folder, or one below it, cannot be listed.
    """
    return find_files(folder)[0]


def find_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The image files below a folder and its other files, each sorted by path; it skips what :func:`find_images` does.

    An image file is a regular file with one of :data:`IMAGE_SUFFIXES`, or a link to one; a link that leads nowhere
    counts as an image, one that cannot be read.

    Raises:
        ValueError: no such folder, or no images in it.
        OSError: the folder, or one below it, cannot be listed; the error names that one. lost+found, which users may
            not list, is skipped.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds the images")
    if not folder.exists():
        raise ValueError(f"image folder {folder} does not exist")
    images, others = [], []
    found: list[Path] = []
    # folder.rglob would skip a folder that cannot be listed
    for parent, folders, names in os.walk(folder, onerror=_raise_not_listed):
        folders[:] = filter(is_searched, folders)
        found += (Path(parent, name) for name in names if not name.startswith("."))
    for file in sorted(found):
        if is_image_name(file.name) and (file.is_file() or not file.exists()):
            images.append(file)
        else:
            others.append(file)
    if not images:
        has = f"; it has {count_suffixes(others)}" if others else ""
        raise ValueError(f"image folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}){has}")
    return images, others


def count_suffixes(files: Sequence[Path]) -> str:
    """How many files there are of each suffix: '3 .gif files, 1 file without suffix'."""
    kinds = Counter((file.suffix.lower(), file.is_file()) for file in files)
    return ", ".join(count_files(suffix, n, regular) for (suffix, regular), n in sorted(kinds.items()))


def count_files(suffix: str, n: int, regular: bool = True) -> str:
    """How many files there are of one suffix: '3 .gif files'."""
    noun = "file" if n == 1 else "files"
    return f"{n:,} {f'{suffix} {noun}' if suffix else f'{noun} without suffix'}{'' if regular else ' (not regular)'}"


def read_images(files: Sequence[Path], size: int, min_side: int = 0) -> torch.Tensor:
    """Decode files: (N, 3, size, size) uint8 in the order of ``files``; many of them with a progress bar.

    ``min_side`` is that of :func:`read_image`.
    """
    images = np.empty((len(files), 3, size, size), dtype=np.uint8)
    for i, file in enumerate(progress("reading images", len(files), "image", files, disable=len(files) < 5000)):
        images[i] = np.asarray(square(read_image(file, min_side), size)).transpose(2, 0, 1)
    return torch.from_numpy(images)


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 (N, C, H, W) in 0..255 -> float32 of the given mean and deviation (both of values in 0..1, by channel)."""
    scale = torch.tensor(std, device=images.device).mul(255).view(1, -1, 1, 1)
    shift = torch.tensor(mean, device=images.device).mul(255).view(1, -1, 1, 1)
    return (images.float() - shift) / scale


def square(image: Image.Image, size: int) -> Image.Image:
    """The image's centre square: its shorter side resized (bicubic) to ``size`` pixels, an image of that size as is.

    Of images longer than 8:1 the middle alone is resized: all of 3,000,000 x 1 pixels would fill the memory.
    """
    if image.size == (size, size):
        return image
    longest = _LONGEST * min(image.size)
    if max(image.size) > longest:
        left, top = (max(0, side - longest) // 2 for side in image.size)
        image = image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))
    width, height = image.size
    scale = size / min(width, height)
    resized = image.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def is_system_folder_error(error: OSError) -> bool:
    """Whether a folder cannot be listed because it is the system's own lost+found."""
    return isinstance(error, PermissionError) and Path(error.filename).name == "lost+found"


def _raise_not_listed(error: OSError) -> None:
    if is_system_folder_error(error):
        return
    raise OSError(
        error.errno, f"folder {error.filename} cannot be listed: {error.strerror}; make it readable, or try again"
    ) from error


def _white(image: Image.Image) -> int | None:
    """The largest value that an image's mode and file can hold; None where that is not known."""
    if image.mode.startswith("I;16"):
        # Pillow reads TIFFs of 12 bits as 16-bit ones, unscaled
        bits: int = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        return 2**bits - 1
    if image.mode == "I":
        # PNG has no wider integers, and Pillow scales those of PPM; TIFFs have signed and 32-bit ones
        return 65535 if image.format in ("PNG", "PPM") else None
    return None if image.mode == "F" else 255


def _to_8_bits(image: Image.Image, white: int, is_negative: bool) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    grey = ((values * 255 + white // 2) // white).astype(np.uint8)
    if is_negative:
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        # what is transparent has no colour worth learning: show it on white, as viewers do
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")
