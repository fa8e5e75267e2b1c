"""The dataset `photos`: photographs of four public datasets to pretrain on, without any that resemble test images.

    python -m training photos --data DIR --output DIR/photos

DIR contains the datasets that docs/reproduce.md lists: imagenette2-320, imagewoof2-320, miniplaces (Places, 100 scenes
at 128 pixels), caltech101 (101_ObjectCategories, train.txt, test.txt) and VOCdevkit/VOC2007. The training images are
written as squares of 192 pixels, JPEG at quality 85; those of miniplaces, which are smaller, are copied. Training
images that look like a held-out image are left out; held out are imagenette, imagewoof and miniplaces val, caltech101's
test list and all of VOC2007. photos.json names the images that were left out, and has the sha256 of the list of those
written.

The dataset `photo-views` reads DIR/photos and, from the other folders, whole photographs, for `rotation-ssl orient`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from rotation_ssl.cli.options import positive
from rotation_ssl.images import find_images, read_image, square
from rotation_ssl.pretraining.images import UnlabelledImages, open_files
from rotation_ssl.progress import progress
from training.command import create_parser, run

SIZE = 192
QUALITY = 85
HASH_SIDE = 16
# of 256 bits: photographs that differ in more are not taken for the same
NEAR = 24
LIST = "photos.json"
# of the whole set, once the images like held-out ones are left out
IMAGES = 114_334
SHA256_OF_NAMES = "8e17ba2ba123bb558ebfd5581c75c2cd4544fae69f4155b7d64f3ca2ced820ca"

Value = TypeVar("Value")


# the folder of each source, and its training and held-out images, as find_part takes them
SOURCES = {
    "imagenette2-320": ("train", "val"),
    "imagewoof2-320": ("train", "val"),
    "miniplaces": ("data/images/train", "data/images/val"),
    "caltech101": ("train.txt", "test.txt"),
    "VOCdevkit/VOC2007": ("", "JPEGImages"),
}


def find_part(source: Path, part: str) -> list[Path]:
    """The images of a source below one of its folders, or those that one of its lists (.txt) names; of "" none."""
    if not part.endswith(".txt"):
        return find_images(source / part) if part else []
    listing = source / part
    try:
        lines = listing.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"{listing}, the list of its images, cannot be read; fetch {source.name} again") from error
    return sorted(source / "101_ObjectCategories" / line.strip() for line in lines if line.strip())


def training_files(root: Path) -> list[Path]:
    """The training images of all sources, in the order of their names."""
    missing = [source for source in SOURCES if not (root / source).is_dir()]
    if missing:
        raise ValueError(f"{root} lacks {', '.join(missing)}: give the folder that holds the datasets")
    return sorted(file for source, (train, _) in SOURCES.items() for file in find_part(root / source, train))


def listed_files(root: Path, source: str) -> list[Path]:
    """The held-out images of one source, of VOC2007 those of its test list, in the order of their names."""
    if not (root / source).is_dir():
        raise ValueError(f"{root} lacks {source}: give the folder that holds the datasets")
    _, held_out = SOURCES[source]
    files = find_part(root / source, held_out)
    if source.startswith("VOCdevkit"):
        names = set((root / source / "ImageSets" / "Main" / "test.txt").read_text().split())
        files = [file for file in files if file.stem in names]
    return files


def photo_files(folder: Path) -> list[Path]:
    """The images of a set that was written, in the order of their names."""
    if not (folder / "train").is_dir():
        raise ValueError(f"no photos in {folder}: write them with python -m training photos --output {folder}")
    files = find_images(folder / "train")
    if sha256_of_names(folder / "train", files) != SHA256_OF_NAMES:
        raise ValueError(f"{folder} is not the whole of photos: {len(files):,} images of {IMAGES:,}, or others")
    return files


def open_views(root: Path, size: int) -> UnlabelledImages:
    """The dataset `photo-views`: the central squares of photographs, and whole ones squeezed to a square, the two views
    that `rotation-ssl orient` has of elongated pictures.

    The scenes of MiniPlaces, the largest part of `photos`, are in it once. Every other photograph is in it four times:
    twice as its square, and twice whole.

    Args:
        root: contains the datasets, and `photos`.
        size: side of the squares.

    Raises:
        ValueError: a dataset is missing, or a part of it or of `photos`.
    """
    originals = {file.relative_to(root).with_suffix(""): file for file in training_files(root)}
    folder = root / "photos"
    views: list[tuple[Path, bool]] = []
    for file in photo_files(folder):
        name = file.relative_to(folder / "train").with_suffix("")
        if name not in originals:
            raise ValueError(f"{root / name} is missing, of which {folder} has the square: fetch {name.parts[0]} again")
        scene = name.parts[0] == "miniplaces"
        views += [(file, False)] if scene else [(file, False), (originals[name], True)] * 2
    images = open_files([file for file, _ in views], size)
    images.read = partial(_read_view, images.read, np.array([whole for _, whole in views]), size)
    return images


def _read_view(read: Callable[[int], Image.Image], whole: np.ndarray, size: int, index: int) -> Image.Image:
    image = read(index)
    return image.resize((size, size), Image.Resampling.BICUBIC) if whole[index] else image


def sha256_of_names(root: Path, files: Sequence[Path]) -> str:
    """sha256 of the files' names below ``root`` without their suffixes, a line each."""
    names = sorted(str(file.relative_to(root).with_suffix("")) for file in files)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def difference_hash(file: Path) -> np.ndarray:
    """Whether each of 16 x 16 parts of a photograph is darker than the one right of it, (256,) bool.

    The hash stays the same under resizing, and nearly so under compression.
    """
    grey = read_image(file).convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.int16)
    return (values[:, :-1] < values[:, 1:]).reshape(-1)


def nearest(hashes: torch.Tensor, others: torch.Tensor, part: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """For each hash of (N, D) bool the number of bits in which the most alike of ``others`` (M, D) differs, and its
    position: both (N,) int64.
    """
    signs = others.float() * 2 - 1
    found = [((own.float() * 2 - 1) @ signs.T).max(1) for own in hashes.split(part)]
    alike = torch.cat([most.values for most in found]).long()
    return (hashes.shape[1] - alike) // 2, torch.cat([most.indices for most in found])


def find_duplicates(train: Sequence[Path], held_out: Sequence[Path], workers: int) -> dict[int, tuple[int, int]]:
    """Training images that look like a held-out one: index -> the held-out one's, and the bits in which they differ.

    A photograph and its mirror image are the same, but where it is flat: what is as dark as its neighbour is so in the
    mirror image too. Of photos this missed two, Leopards/image_0072 and image_0131 of Caltech-101, whose mirror images
    are in its test list. They stay, for the published weights were trained on them.
    """
    hashes = torch.from_numpy(np.stack(_map(difference_hash, train, workers, "comparing training images")))
    others = torch.from_numpy(np.stack(_map(difference_hash, held_out, workers, "comparing held-out images")))
    bits, which = nearest(hashes, others)
    # mirrored, what was darker than its right neighbour is lighter than its left one
    mirrored = ~others.view(-1, HASH_SIDE, HASH_SIDE).flip(2).reshape(len(others), -1)
    bits_mirrored, which_mirrored = nearest(hashes, mirrored)
    which = torch.where(bits_mirrored < bits, which_mirrored, which)
    bits = torch.minimum(bits, bits_mirrored)
    return {i: (int(which[i]), int(bits[i])) for i in (bits <= NEAR).nonzero()[:, 0].tolist()}


def write_square(size: int, root: Path, output: Path, file: Path) -> None:
    """Write a photograph's centre square under the same name below ``output``; a smaller one is copied."""
    target = output / file.relative_to(root).with_suffix(".jpg")
    target.parent.mkdir(parents=True, exist_ok=True)
    image = read_image(file)
    if max(image.size) < size:
        shutil.copyfile(file, target)
    else:
        square(image, size).save(target, quality=QUALITY)


def prepare(root: Path, output: Path, workers: int) -> dict[str, Any]:
    """Write the set, and photos.json last: how many images, the sha256 of their names, and the images left out."""
    if (output / LIST).exists():
        raise ValueError(f"{output} already contains the set: give another --output")
    train = training_files(root)
    held_out = [file for source, (_, part) in SOURCES.items() for file in find_part(root / source, part)]
    duplicates = find_duplicates(train, held_out, workers)
    kept = [file for i, file in enumerate(train) if i not in duplicates]
    _map(partial(write_square, SIZE, root, output / "train"), kept, workers, "writing squares")
    listing = {
        "images": len(kept),
        "sha256_of_names": sha256_of_names(root, kept),
        "left_out": [
            {
                "image": str(train[i].relative_to(root)),
                "like": str(held_out[j].relative_to(root)),
                "bits": bits,
            }
            for i, (j, bits) in duplicates.items()
        ],
    }
    (output / LIST).write_text(json.dumps(listing, indent=1) + "\n")
    return listing


def _map(function: Callable[[Path], Value], files: Sequence[Path], workers: int, what: str) -> list[Value]:
    with ProcessPoolExecutor(workers) as pool:
        return list(progress(what, len(files), items=pool.map(function, files, chunksize=64)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = create_parser("photos", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--workers", type=positive, default=2, help="processes that read and write images [%(default)s]"
    )
    args = parser.parse_args(arguments)

    def work() -> None:
        listing = prepare(args.data, args.output, args.workers)
        print(f"wrote {listing['images']:,} images to {args.output}; left out {len(listing['left_out'])}")

    return run(work)
