"""A small VOCdevkit of real images: CIFAR-10 objects pasted on photographs, at places that the annotations say.

Masks have the object's whole square, with a frame of two pixels that does not count, as VOC's have. One object in eight
is difficult: pasted faintly, and flagged.
"""

import math
import random

import numpy as np
import torch
from conftest import SAMPLES
from PIL import Image

from training.transfer.data import CLASSES as VOC_CLASSES
from training.transfer.data import read_annotations
from training.transfer.proposals import write_proposals

# CIFAR-10's name -> VOC's
CLASSES = {"airplane": "aeroplane", "automobile": "car", "bird": "bird", "cat": "cat", "dog": "dog", "horse": "horse"}
YEAR = "2007"
FRAME = 2


def write_small_voc(
    folder, train=24, test=12, classes=("aeroplane", "car"), size=(160, 128), objects=(1, 2), sides=(56, 88), seed=0
):
    """Write VOCdevkit/VOC2007 into a folder, splits train, val, trainval and test; returns the VOCdevkit."""
    rng = random.Random(seed)
    devkit = folder / "VOCdevkit"
    root = devkit / f"VOC{YEAR}"
    for part in ("ImageSets/Main", "ImageSets/Segmentation", "JPEGImages", "Annotations", "SegmentationClass"):
        (root / part).mkdir(parents=True, exist_ok=True)
    photographs = [Image.open(file).convert("RGB") for file in sorted((SAMPLES / "photos").glob("*.jpg"))]
    cut_outs = {
        voc: [Image.open(file).convert("RGB") for file in sorted((SAMPLES / "cifar10").glob(f"{ours}_*.png"))]
        for ours, voc in CLASSES.items()
        if voc in classes
    }
    names = [f"{index:06d}" for index in range(1, train + test + 1)]
    for index, name in enumerate(names):
        image = background(rng.choice(photographs), size, rng)
        mask = np.zeros((size[1], size[0]), dtype=np.uint8)
        placed = []
        for _ in range(rng.randint(*objects)):
            # classes in turns, so that a few images have all of them
            label = classes[(index + len(placed)) % len(classes)]
            box = free_place(size, rng.randint(*sides), [box for _, box, _ in placed], rng)
            if box is None:
                continue
            difficult = rng.random() < 1 / 8
            paste(image, mask, rng.choice(cut_outs[label]), box, label, difficult)
            placed.append((label, box, difficult))
        image.save(root / "JPEGImages" / f"{name}.jpg", quality=92)
        Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_text(annotation(name, size, placed))
    half = train // 2
    splits = {"train": names[:half], "val": names[half:train], "trainval": names[:train], "test": names[train:]}
    for split, members in splits.items():
        for lists in ("Main", "Segmentation"):
            (root / "ImageSets" / lists / f"{split}.txt").write_text("".join(f"{member}\n" for member in members))
    return devkit


def background(photograph, size, rng):
    left = rng.randint(0, photograph.width - size[0])
    top = rng.randint(0, photograph.height - size[1])
    image = photograph.crop((left, top, left + size[0], top + size[1]))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def free_place(size, side, taken, rng):
    """A square (left, top, right, bottom) that touches no other, or None."""
    for _ in range(50):
        left, top = rng.randint(0, size[0] - side), rng.randint(0, size[1] - side)
        box = (left, top, left + side, top + side)
        if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in taken):
            return box
    return None


def paste(image, mask, cut_out, box, label, difficult):
    left, top, right, bottom = box
    cut_out = cut_out.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    if difficult:
        cut_out = Image.blend(cut_out, image.crop(box), 0.6)
    image.paste(cut_out, box)
    mask[top:bottom, left:right] = 255
    mask[top + FRAME : bottom - FRAME, left + FRAME : right - FRAME] = VOC_CLASSES.index(label) + 1


def annotation(name, size, placed):
    """VOC's XML: boxes count from 1 and include the last pixel."""
    objects = "".join(
        f"<object><name>{label}</name><pose>Unspecified</pose><truncated>0</truncated>"
        f"<difficult>{int(difficult)}</difficult><bndbox><xmin>{box[0] + 1}</xmin><ymin>{box[1] + 1}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for label, box, difficult in placed
    )
    return (
        f"<annotation><folder>VOC{YEAR}</folder><filename>{name}.jpg</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height><depth>3</depth></size><segmented>1</segmented>{objects}</annotation>\n"
    )


def grid_proposals(width, height):
    """Windows of five sizes and three shapes all over an image: (n, 4), as a file of proposals has them."""
    boxes = []
    for part in (0.2, 0.35, 0.5, 0.7, 1.0):
        for shape in (0.5, 1.0, 2.0):
            w = min(width, part * min(width, height) * shape**0.5)
            h = min(height, part * min(width, height) / shape**0.5)
            lefts = torch.linspace(0, width - w, max(1, math.ceil(4 * (width - w) / w) + 1))
            tops = torch.linspace(0, height - h, max(1, math.ceil(4 * (height - h) / h) + 1))
            corners = torch.cartesian_prod(lefts, tops)
            boxes.append(torch.cat([corners, corners + torch.tensor([w, h])], 1))
    return torch.cat(boxes)


def write_grid(devkit, file):
    """Write the windows of every image as a file of proposals; returns it."""
    images = [image for split in ("trainval", "test") for image in read_annotations(devkit, YEAR, split)]
    write_proposals(file, {image.name: grid_proposals(image.width, image.height) for image in images})
    return file
