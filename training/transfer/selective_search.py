"""Regions that may show an object, by selective search: what Fast R-CNN of the paper looks at.

    python -m training proposals --data VOCdevkit --output proposals.safetensors
    python -m training detect MODEL --data VOCdevkit --proposals proposals.safetensors

Selective search (Uijlings et al. 2013, https://doi.org/10.1007/s11263-013-0620-5) is OpenCV's, in its fast mode, on
images whose longer side is scaled down to --scale pixels. All processor cores are used. Images are written in parts to
OUTPUT.parts as they are finished: run the same command again after an interruption, and it goes on where it stopped. At
the end the parts become one safetensors file, and the recall is printed: the fraction of the annotated objects (without
the difficult ones) that a region overlaps by an intersection over union of 0.5 or more.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import importlib
import json
import shutil
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torchvision.ops import box_iou
from tqdm import tqdm

from rotation_ssl.machine import cpus
from rotation_ssl.progress import progress
from training.command import create_parser, run
from training.transfer.data import CLASSES, AnnotatedImage, open_pixels, read_annotations
from training.transfer.network import InOrder, batches
from training.transfer.proposals import write_proposals

SCALE = 250  # pixels: 0.2 s an image on one core
FIRST_SEGMENTS = 150  # OpenCV's base_k and increment of its fast mode: the larger, the fewer and larger the segments
MOST = 2000  # regions an image, as in Fast R-CNN
PART = 50  # images: 10 s of work are lost in an interruption


def selective_search(image: Image.Image, scale: int = SCALE, most: int = MOST, seed: int = 0) -> torch.Tensor:
    """Regions of an image, (n, 4) float32: left, top, right, bottom in its pixels, the first ones the likeliest.

    Args:
        image: RGB.
        scale: longer side in pixels that a larger image is scaled down to.
        most: regions to keep.
        seed: OpenCV ranks the regions by random numbers.
    """
    segmentation = _opencv().ximgproc.segmentation
    factor = min(1.0, scale / max(image.size))
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    pixels = np.asarray(image.resize(size, Image.Resampling.BOX))
    # OpenCV draws from the C library
    if not sys.platform.startswith("win"):
        ctypes.CDLL(None).srand(seed)
    search = segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(pixels[:, :, ::-1]))
    search.switchToSelectiveSearchFast(FIRST_SEGMENTS, FIRST_SEGMENTS)
    found = torch.from_numpy(np.asarray(search.process(), dtype=np.float32).reshape(-1, 4))
    boxes = torch.cat([found[:, :2], found[:, :2] + found[:, 2:]], 1)
    boxes = boxes * (torch.tensor(image.size) / torch.tensor(size)).repeat(2)
    boxes = torch.minimum(boxes.clamp_min(0), torch.tensor(image.size).repeat(2).float())
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)][:most]
    return boxes if len(boxes) else torch.tensor([[0.0, 0.0, *image.size]])


def search_images(
    images: Sequence[AnnotatedImage], output: Path, scale: int = SCALE, most: int = MOST, workers: int = 0
) -> dict[str, torch.Tensor]:
    """Regions of all images by name, written to a safetensors file; what an interrupted call finished is used.

    Args:
        images: with names that differ.
        output: the file; parts are kept in a folder beside it until all are there.
        scale, most: as of :func:`selective_search`.
        workers: processes that search.
    """
    if output.exists():
        raise ValueError(f"{output} exists already: remove it, or give another --output")
    parts = output.with_name(f"{output.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    settings = {"method": "selective search, fast", "scale": scale, "most": most, "segments": FIRST_SEGMENTS}
    found: dict[str, torch.Tensor] = {}
    todo: list[list[AnnotatedImage]] = []
    for start in range(0, len(images), PART):
        members = list(images[start : start + PART])
        there = _read_part(_part_file(parts, members), members, settings)
        found |= there
        if not there:
            todo.append(members)
    waiting = [image for members in todo for image in members]
    with progress("selective search", len(images), initial=len(found)) as bar:
        regions = batches(InOrder(waiting, functools.partial(_search, scale, most)), 1, workers)
        for members in todo:
            new = {}
            for image in members:
                new[image.name] = next(regions)[0]
                bar.update()
            write_proposals(_part_file(parts, members), new, {"made": _digest(members, settings)})
            found |= new
    ordered = {image.name: found[image.name] for image in images}
    write_proposals(output, ordered, {"settings": json.dumps(settings)})
    shutil.rmtree(parts)
    return ordered


def recall(images: Sequence[AnnotatedImage], regions: Mapping[str, torch.Tensor], first: int | None = None) -> float:
    """The fraction of objects that one of the ``first`` regions (None: of all) overlaps by 0.5 or more.

    Objects marked difficult do not count; nan where there are no others.
    """
    hits = total = 0
    for image in images:
        objects = image.boxes[~image.difficult]
        if len(objects):
            hits += int((box_iou(objects, regions[image.name][:first]).max(1).values >= 0.5).sum())
            total += len(objects)
    return hits / total if total else float("nan")


def _search(scale: int, most: int, image: AnnotatedImage) -> torch.Tensor:
    # the same regions whoever searches, and in whatever order
    return selective_search(open_pixels(image.file), scale, most, zlib.crc32(image.name.encode()))


def _part_file(parts: Path, members: Sequence[AnnotatedImage]) -> Path:
    return parts / f"{members[0].name}-{members[-1].name}.safetensors"


def _digest(members: Sequence[AnnotatedImage], settings: Mapping[str, Any]) -> str:
    described = [[image.name, image.width, image.height, image.file.stat().st_size] for image in members]
    return hashlib.sha256(json.dumps([settings, described]).encode()).hexdigest()


def _read_part(file: Path, members: Sequence[AnnotatedImage], settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a finished part holds; nothing where there is no such part, or a damaged one, which is searched again."""
    if not file.exists():
        return {}
    try:
        with safe_open(file, framework="pt") as part:
            made = (part.metadata() or {}).get("made")
            held = {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118  it is no dictionary
    except SafetensorError as error:
        tqdm.write(f"{file} is damaged ({error}): its images are searched again")
        return {}
    if made != _digest(members, settings):
        raise ValueError(f"{file} is of other images or settings: remove {file.parent}, or give another --output")
    return held


@functools.cache
def _opencv() -> Any:
    cv2: Any = None
    with contextlib.suppress(ImportError):
        cv2 = importlib.import_module("cv2")
    if not hasattr(cv2, "ximgproc"):
        raise ValueError("selective search needs OpenCV with its contributed modules: pip install -e '.[voc]'")
    # the images are searched side by side
    cv2.setNumThreads(1)
    return cv2


def _work(args: argparse.Namespace) -> None:
    if min(args.scale, args.most) < 1:
        raise ValueError("--scale and --most must be at least 1")
    _opencv()
    read = (image for split in args.split for image in read_annotations(args.data, args.year, split, args.classes))
    images = list({image.name: image for image in read}.values())
    regions = search_images(images, args.output, args.scale, args.most, args.workers)
    mean = sum(map(len, regions.values())) / len(images)
    found, first = recall(images, regions), recall(images, regions, 300)
    print(f"{args.output}: {len(images):,} images, {mean:.0f} regions each")
    print(f"recall at 0.5 IoU {found:.1%}, of the first 300 regions {first:.1%}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = create_parser("proposals", __doc__)
    parser.add_argument("--data", type=Path, default=Path("data/VOCdevkit"), help="the VOCdevkit folder [%(default)s]")
    parser.add_argument("--year", default="2007", help="year of VOCdevkit/VOC<year> [%(default)s]")
    parser.add_argument("--split", nargs="+", default=["trainval", "test"], help="image lists [trainval test]")
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), metavar="CLASS", help="class names [VOC's 20]")
    parser.add_argument("--scale", type=int, default=SCALE, help="longer side in pixels, at most [%(default)s]")
    parser.add_argument("--most", type=int, default=MOST, help="regions an image, at most [%(default)s]")
    parser.add_argument("--workers", type=int, default=cpus(), help="worker processes [one for each CPU]")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    args = parser.parse_args(arguments)
    return run(lambda: _work(args))
