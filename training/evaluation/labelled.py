"""Labelled images that may be more than memory holds: in memory, or decoded as they are needed."""

import dataclasses
from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from rotation_ssl.images import find_images
from rotation_ssl.labelled import LabelledImages
from rotation_ssl.pretraining.images import (
    UnlabelledImages,
    fingerprint,
    open_dataset,
    open_entries,
    open_files,
    stream,
)
from rotation_ssl.progress import progress
from training.datasets import DATASETS, FOLDER, list_files, load_cifar10


@dataclasses.dataclass(frozen=True)
class LabelledFiles:
    """N images that are decoded as they are needed, and their ``labels`` (N,) int64: positions in ``classes``."""

    images: UnlabelledImages
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


Labelled = LabelledImages | LabelledFiles


def open_labelled(dataset: str, data_dir: Path, split: str, size: int, download: bool = False) -> Labelled:
    """The training or validation images of a dataset, and their labels.

    Args:
        dataset: one of :data:`DATASETS`, 'folder', or a name of timm for one of torchvision's ('torch/places365').
        split: 'train' or 'val'.
        size: side of the squares in pixels; CIFAR-10 keeps its 32.
        download: let torchvision download it.
    """
    if dataset == "cifar10":
        return load_cifar10(data_dir, "train" if split == "train" else "test", download)
    if dataset in DATASETS:
        files, labels, classes = list_files(dataset, data_dir, "train" if split == "train" else "test")
        return LabelledFiles(open_files(files, size), labels, classes)
    if dataset == FOLDER:
        return _open_folder(data_dir, split, size)
    entries = open_dataset(dataset, data_dir, split, download)
    targets = getattr(entries, "targets", None)
    if targets is None:
        raise ValueError(f"{dataset!r} does not list its labels: use a folder, or torch/places365")
    classes = tuple(map(str, range(int(max(targets)) + 1)))
    return LabelledFiles(open_entries(entries, size, dataset), torch.as_tensor(targets), classes)


def _open_folder(root: Path, split: str, size: int) -> LabelledFiles:
    names = class_folders(root / "train")
    if not names:
        raise ValueError(f"no class folders in {root / 'train'}: expected train/<class>/* and val/<class>/*")
    unknown = sorted(set(class_folders(root / split)) - set(names))
    if unknown:
        raise ValueError(f"{root / split} contains classes that train does not have: {', '.join(unknown[:3])}")
    found = [find_images(root / split / name) for name in names]
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(files) for files in found]))
    return LabelledFiles(open_files([file for files in found for file in files], size), labels, tuple(names))


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def identity_of(data: Labelled) -> str:
    """What tells the images and labels from others, in one line, as :func:`fingerprint`."""
    side = data.images.shape[-1] if isinstance(data, LabelledImages) else data.images.size
    return f"{side} pixels of {fingerprint(data.images)}, labels {fingerprint(data.labels)}"


def read_into_memory(data: Labelled, workers: int) -> Labelled:
    """The images in memory if they fit, else unchanged."""
    if isinstance(data, LabelledImages) or not data.images.fits_memory(copies=2):
        return data
    data.images.read_all(workers)
    _refuse_broken(data, data.images.broken)
    return data


def split_holdout(data: Labelled, holdout: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices to train on, and ``holdout`` random others to test on, always the same ones."""
    if not 0 < holdout < len(data):
        raise ValueError(f"holdout must be 1 to {len(data) - 1} of the training images, got {holdout}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return order[:-holdout], order[-holdout:]


def squares_of(
    data: Labelled, indices: Iterator[torch.Tensor], workers: int, pin: bool = False
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """Squares (B, 3, H, H) uint8 and labels (B,) at each of the indices (B,).

    Args:
        indices: of each batch.
        workers: data-loading worker processes; 0: this process.
        pin: use page-locked memory, for a GPU.
    """
    # workers run ahead of what is yielded
    asked: list[torch.Tensor] = []

    def remembered() -> Iterator[torch.Tensor]:
        for part in indices:
            asked.append(part)
            yield part

    for pixels, broken in stream(data.images, remembered(), workers, pin):
        if isinstance(data, LabelledFiles):
            _refuse_broken(data, broken)
        yield pixels, data.labels[asked.pop(0)]


def check_decoding(data: Labelled, chosen: torch.Tensor, workers: int) -> None:
    """Decode the images at ``chosen`` (M,) once, unless they are in memory."""
    if isinstance(data, LabelledImages) or data.images.squares is not None:
        return
    with progress("checking", len(chosen)) as bar:
        for pixels, _ in squares_of(data, iter(chosen.split(100)), workers):
            bar.update(len(pixels))


def _refuse_broken(data: LabelledFiles, broken: set[int]) -> None:
    if broken:
        raise ValueError(f"image {data.images.name_of(min(broken))} does not decode: replace or remove it")
