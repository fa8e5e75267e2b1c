"""Images to pretrain on, as squares of one size: held in memory where they fit, else decoded by workers as they come.

They are in a folder, in tar shards, or in a dataset of timm.

Either way index i is the same square of the same image, so that a run does not depend on which it was. An image that
does not decode is skipped: the next one that does takes its place, and it is counted and named.
"""

import hashlib
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rotation_ssl.images import FAILURES, find_images, read_image, square
from rotation_ssl.machine import available_memory
from rotation_ssl.messages import first_line, killed_worker_errors
from rotation_ssl.pretraining.shards import ShardIndex, index_shards, is_shards, member_name, read_member
from rotation_ssl.progress import progress

BROKEN_IN_A_ROW = 100  # so many mean that it is not the images that are broken


class UnlabelledImages(Dataset[tuple[torch.Tensor, list[int]] | ValueError]):
    """N unlabelled images as squares, decoded by index.

    ``images[i]`` is a pair: (3, size, size) uint8, and the indices of the broken images that it replaces, because the
    next image that decodes takes the place of a broken one. If too many in a row are broken, or the disk fails, it is a
    ValueError, returned and not raised.

    Args:
        size: side of the squares: the shorter side is resized to it (bicubic), the centre is taken.
        count: N.
        read: index -> RGB image; raises ValueError where it does not decode, OSError where no image can be read.
        name_of: index -> name of the image, for messages.
        describe: gives the text of ``fingerprint``; None: the number of images.
        shards: index of the first image of each shard; images are read from a few shards at a time.

    ``squares`` are those of all images once they are in memory, ``broken`` the indices of those found broken then.
    """

    def __init__(
        self,
        size: int,
        count: int,
        read: Callable[[int], Image.Image],
        name_of: Callable[[int], str] = str,
        describe: Callable[[], str] | None = None,
        shards: tuple[int, ...] = (0,),
    ) -> None:
        self.size, self.count, self.read, self.name_of, self.describe = size, count, read, name_of, describe
        self.shards = shards
        self.holdout = 0
        self.squares: torch.Tensor | None = None
        self.broken: set[int] = set()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, list[int]] | ValueError:
        trained = self.count - self.holdout
        first, end = (0, trained) if index < trained else (trained, self.count)
        broken: list[int] = []
        while True:
            try:
                pixels = np.asarray(square(self.read(index), self.size))
                return torch.from_numpy(pixels.copy()).permute(2, 0, 1), broken
            except ValueError as error:
                broken.append(index)
                if len(broken) == min(BROKEN_IN_A_ROW, end - first):
                    # returned: raised in a worker it would reach the user as a traceback
                    return ValueError(f"skipped {len(broken)} broken images in a row, the last one: {error}")
                index = first + (index + 1 - first) % (end - first)
            except OSError as error:
                return ValueError(str(error))

    def set_holdout(self, holdout: int) -> None:
        """Hold out the last ``holdout`` images: a broken image is replaced only by one of its own part.

        Raises:
            ValueError: the images are in memory already, with another holdout.
        """
        if self.squares is not None and holdout != self.holdout:
            raise ValueError(f"the images were read with {self.holdout} held out, not {holdout}: read them again")
        self.holdout = holdout

    def fits_memory(self, copies: int = 1) -> bool:
        """Whether ``copies`` times all squares fit into half of the available memory (4 GiB if it is unknown)."""
        available = available_memory()
        return copies * self.count * 3 * self.size**2 <= (4 * 2**30 if available is None else available / 2)

    def read_all(self, workers: int = 0, quiet: bool = False) -> None:
        """Read all squares into memory.

        Args:
            workers: data-loading worker processes; 0: this process.
            quiet: without a progress bar.

        Raises:
            ValueError: too many images in a row do not decode.
        """
        squares = torch.empty((self.count, 3, self.size, self.size), dtype=torch.uint8)
        parts = torch.arange(self.count).split(64)
        with progress("reading images", self.count, "image", disable=quiet) as bar:
            for part, (pixels, broken) in zip(parts, stream(self, parts, workers), strict=True):
                squares[part] = pixels
                self.broken |= broken
                bar.update(len(part))
        self.squares = squares


def open_files(files: Sequence[Path], size: int) -> UnlabelledImages:
    """Image files, opened one by one as they are asked for, as squares of ``size`` pixels."""
    # one array: a list of a million paths would be copied into every worker, object by object, as it is read
    names = np.array([os.fsencode(file) for file in files])
    describe = partial(_describe_files, names)
    return UnlabelledImages(size, len(names), partial(_read_file, names), partial(_file_name, names), describe)


def open_shards(pattern: str, size: int, workers: int = 0) -> UnlabelledImages:
    """The images in tar shards, indexed now and read one by one as they are asked for.

    Args:
        pattern: ``{000..999}.tar``, or a single tar file.
        size: side of the squares.
        workers: worker processes that index the shards; 0: this process.

    Raises:
        ValueError: shards that are missing or damaged, or no images in them.
    """
    index = index_shards(pattern, workers)
    return UnlabelledImages(
        size, len(index), partial(read_member, index), partial(member_name, index), partial(_describe_shards, index),
        tuple(index.firsts.tolist()),
    )  # fmt: skip


def fingerprint(images: torch.Tensor | UnlabelledImages) -> str:
    """A line that differs when the images do: a resumed run must have the one it began with.

    - A tensor: sha256 of shape and pixels.
    - Image files: sha256 of names (relative to the folder they share), sizes and modification times. The images in
      memory and those streamed have the same. A copy of the folder has it where it keeps the times (``cp -p``). Each
      file is asked for its size and time: some seconds for a million files on a local disk.
    - Shards: the same of the tar files.
    - Other datasets of ``timm.data.create_dataset``: name and length only. Other images under the same name are not
      noticed.
    """
    if isinstance(images, torch.Tensor):
        digest = hashlib.sha256(str(tuple(images.shape)).encode())
        digest.update(images.cpu().contiguous().numpy().data)
        return f"pixels with sha256 {digest.hexdigest()}"
    return images.describe() if images.describe else f"{len(images)} images"


def open_images(data: str, root: Path, size: int, download: bool = False, workers: int = 0) -> UnlabelledImages:
    """The training images of a dataset, without their labels; opened, not read.

    Args:
        data: 'folder', all images below ``root/train`` where there is such a folder, else below ``root``, or in tar
            shards; or a name of ``timm.data.create_dataset``: 'torch/places365', 'hfds/OWNER/NAME'.
        root: where it is; of shards their names, ``{000..999}.tar``.
        size: side of the squares.
        download: let torchvision fetch it.
        workers: worker processes that index shards; 0: this process.

    Raises:
        ValueError: no such dataset, nothing in it, or one that can only be read from start to end.
    """
    if data == "folder" and download:
        raise ValueError("--download is for datasets of torchvision: give --dataset torch/NAME")
    if data == "folder" and is_shards(root):
        return open_shards(str(root), size, workers)
    if data == "folder":
        return open_files(find_images(root / "train" if (root / "train").is_dir() else root), size)
    return open_entries(open_dataset(data, root, "train", download), size, data)


def open_dataset(data: str, data_dir: Path, split: str, download: bool = False) -> Any:
    """A dataset of ``timm.data.create_dataset`` that is read by index.

    Raises:
        ValueError: there is none, or it can only be read from start to end.
    """
    if "/" not in data:
        # timm would take any other name for that of a folder
        raise ValueError(f"no dataset is called {data!r}: give folder, or a name such as torch/places365")
    try:
        dataset = create_dataset(data, root=str(data_dir), split=split, download=download)
    except Exception as error:
        # whatever the libraries behind the name raise: assertions, missing packages, connections
        reason = first_line(error)
        raise ValueError(f"dataset {data!r} in {data_dir} cannot be opened ({reason})") from error
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{data!r} can only be read from start to end: take one that is read by index (hfds/, torch/), or give its "
            "tar files as --data '{000..999}.tar'"
        )
    return dataset


def open_entries(dataset: Any, size: int, name: str = "") -> UnlabelledImages:
    """The images of a dataset of :func:`open_dataset`, which calls it ``name``."""
    read, label = partial(_read_entry, dataset), partial(_entry_name, dataset)
    return UnlabelledImages(size, len(dataset), read, label, partial(_describe_entries, dataset, name))


def stream(
    images: torch.Tensor | UnlabelledImages, indices: Iterable[torch.Tensor], workers: int = 0, pin: bool = False
) -> Iterator[tuple[torch.Tensor, set[int]]]:
    """The squares at each of the ``indices`` (B,): (B, 3, size, size) uint8, and the broken images met.

    Args:
        images: in memory, or to be decoded.
        indices: of each batch, in order; may be without end.
        workers: data-loading worker processes, which decode ahead; 0: this process.
        pin: into page-locked memory, for a GPU.

    Raises:
        ValueError: too many images in a row do not decode, or the disk or the network failed.
        OSError: a process was killed.
    """
    held = images if isinstance(images, torch.Tensor) else images.squares
    if held is not None:
        yield from ((held[index.to(held.device)], set()) for index in indices)
        return
    loader = DataLoader(
        cast(UnlabelledImages, images),
        batch_sampler=(index.tolist() for index in indices),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        # in process groups of their own: who stops the run stops it at the end of a step, with all workers alive
        worker_init_fn=_set_apart,
        # its seed for the workers would be drawn from torch's own generator: dropout would differ after a resume
        generator=torch.Generator(),
    )
    with killed_worker_errors():
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            yield batch


def _file_name(files: np.ndarray, index: int) -> str:
    return os.fsdecode(files[index])


def _read_file(files: np.ndarray, index: int) -> Image.Image:
    return read_image(Path(_file_name(files, index)))


def _describe_files(files: np.ndarray | Sequence[str]) -> str:
    # the smallest and the largest name begin with what all begin with; cut to whole folders below
    shared = os.path.commonprefix([os.fsdecode(min(files)), os.fsdecode(max(files))])  # noqa: RUF071
    begin = len(os.fsencode(shared[: shared.rfind(os.sep) + 1]))
    digest = hashlib.sha256()
    for file in files:
        try:
            found = os.stat(file)  # noqa: PTH116  a Path takes four times as long, and there may be a million
            state = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:
            state = "unreadable"  # counted as a broken image later
        digest.update(os.fsencode(file)[begin:] + f"\0{state}\n".encode())
    return f"{len(files)} files whose names, sizes and times have sha256 {digest.hexdigest()}"


def _describe_shards(index: ShardIndex) -> str:
    return f"{len(index)} images in {_describe_files(index.files)}"


def _describe_entries(dataset: Any, name: str) -> str:
    files = _entry_files(dataset)
    return _describe_files([file for file, _ in files]) if files else f"{len(dataset)} images of {name}"


def _entry_name(dataset: Any, index: int) -> str:
    files = _entry_files(dataset)
    return str(files[index][0]) if files else str(index)


def _entry_files(dataset: Any) -> Sequence[tuple[str, int]] | None:
    # torchvision's folders and Places365: file and class of every image
    return getattr(dataset, "imgs", None)


def _read_entry(dataset: Any, index: int) -> Image.Image:
    try:
        if not hasattr(dataset, "reader"):
            return read_image(dataset[index][0])
        # timm's dataset skips broken images silently and requires labels, so its reader is used directly
        with _open_entry(dataset.reader, index) as file:
            return read_image(file)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FAILURES:
            raise
        # whatever the libraries raise that decode by themselves
        raise ValueError(f"image {index} does not decode ({error})") from error


def _open_entry(reader: Any, index: int) -> IO[bytes]:
    if not hasattr(reader, "image_key"):
        file: IO[bytes] = reader[index][0]
        return file
    entry = reader.dataset[index][reader.image_key]  # of the datasets library, not decoded
    return io.BytesIO(entry["bytes"]) if entry.get("bytes") else Path(entry["path"]).open("rb")


def _collate(
    items: list[tuple[torch.Tensor, list[int]] | ValueError],
) -> tuple[torch.Tensor, set[int]] | ValueError:
    good = []
    for item in items:
        if isinstance(item, ValueError):
            return item
        good.append(item)
    return torch.stack([pixels for pixels, _ in good]), {index for _, broken in good for index in broken}


def _set_apart(worker: int) -> None:
    os.setpgrp()
    run = multiprocessing.parent_process()
    if run and run.pid == os.getppid() and hasattr(signal, "sigwaitinfo"):
        # a signal is only waited for where it is blocked, in all threads, and a process that was forked has one; one of
        # a fork server has those of the libraries that it imported
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_run, args=(run.pid,), daemon=True).start()


def _end_with_the_run(run: int) -> None:
    """End this worker at a SIGTERM of the run itself, which may need it until its checkpoint is written.

    Slurm and systemd send theirs to every process of a job. A worker whose run was killed ends by itself.
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
        pass
    os._exit(0)
