"""How fast NIN trains and gives features, against a naive pipeline and against this machine's own matrix products.

Every measurement is a fresh process: memory that one has kept, or its threads, cannot help another.
"""

import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm import tqdm

from rotation_ssl.features import extract_features
from rotation_ssl.images import find_images, normalize, read_images
from rotation_ssl.machine import device_name, keep_large_blocks, library_versions
from rotation_ssl.precision import autocast_type, warn_if_emulated
from rotation_ssl.pretraining.batches import augmented_batches
from rotation_ssl.pretraining.loop import train_step
from rotation_ssl.pretraining.optim import create_optimizers, create_sgd
from rotation_ssl.pretraining.recipe import Sgd, Stage, with_image_size
from rotation_ssl.pretraining.setup import create_accelerator, create_model
from rotation_ssl.rotations import rotation_loss
from rotation_ssl.zoo.golden import SAMPLES_DIR
from training.recipes import NIN_CIFAR10_CPU
from training.reporting.rows import current_commit

MODEL = "rotnet_nin"
ROTATIONS = 4
GEMM_SIZES = (1024, 2048, 4096)
SAMPLES = SAMPLES_DIR / "cifar10"


@dataclass(frozen=True)
class Case:
    """What one process measures.

    ``what`` is 'training' (this project's own step), 'naive' (see :class:`NaiveDataset`), 'features' or 'product' (of
    square matrices). ``images`` are the rotated ones of a training step, or those of a batch of features.
    """

    what: str
    size: int = 32
    images: int = 512
    precision: str = "bf16"
    keep_blocks: bool = True


@dataclass(frozen=True)
class Speed:
    """What came out: images a second, the FLOP an image takes, and the process's peak of resident memory.

    Of matrix products ``images_per_second`` is products a second.
    """

    images_per_second: float
    flop: float
    peak_bytes: int


def measure(case: Case, steps: int = 4) -> Speed:
    """Run a case in a process of its own.

    Args:
        case: what to measure.
        steps: timed after one to warm up; the median counts.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, case, steps).result()


def peak_memory() -> int:
    """The most that this process has had in memory, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage's figure begins with that of the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _measure(case: Case, steps: int) -> Speed:
    if case.keep_blocks:
        keep_large_blocks()
    kinds = {"training": _training, "naive": _naive, "features": _features, "product": _product}
    step, images, flop = kinds[case.what](case)
    seconds = []
    for number in range(steps + 1):
        started = time.perf_counter()
        step()
        if number:
            seconds.append(time.perf_counter() - started)
    return Speed(images / statistics.median(seconds), flop, peak_memory())


def _training(case: Case) -> tuple[Callable[[], object], int, float]:
    upright = case.images // ROTATIONS
    recipe = replace(with_image_size(NIN_CIFAR10_CPU, case.size), images_per_step=upright, precision=case.precision)
    recipe = replace(recipe, stages=(Stage(1000, case.size),))
    images = _images(case.size, max(2048, upright))
    accelerator = create_accelerator(recipe, cpu=True)
    model = create_model(recipe).to(memory_format=torch.channels_last)
    batches = augmented_batches(recipe, model, images, len(images), accelerator, 0, set())
    flop = flop_per_image(case.size, training=True)
    prepared = accelerator.prepare(model)
    optimizers = [accelerator.prepare(o) for o in create_optimizers(recipe.optimizer, model, recipe.precision)]
    return lambda: train_step(recipe, prepared, optimizers, batches, accelerator), case.images, flop


def _naive(case: Case) -> tuple[Callable[[], object], int, float]:
    upright = case.images // ROTATIONS
    dataset = NaiveDataset(_images(case.size, max(2048, upright)).permute(0, 2, 3, 1).numpy())
    loader = iter(DataLoader(dataset, upright, shuffle=True, num_workers=2, drop_last=True))
    model = timm.create_model(MODEL, num_classes=ROTATIONS).train()
    optimizer = create_sgd(Sgd(), model.parameters())

    def step() -> None:
        views, labels = next(loader)
        loss = F.cross_entropy(model(views.flatten(0, 1)), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, case.images, flop_per_image(case.size, training=True)


class NaiveDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """One image at a time: cropped and mirrored as a PIL image, turned by numpy, each turn normalised by itself.

    What the authors' code does (dataloader.py of gidariss/FeatureLearningRotNet), in today's torchvision.
    """

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        cfg = timm.get_pretrained_cfg(MODEL)
        self.augment = transforms.Compose(
            [transforms.ToPILImage(), transforms.RandomCrop(images.shape[1], 4), transforms.RandomHorizontalFlip()]
        )
        self.normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(cfg.mean, cfg.std)])

    def __len__(self) -> int:
        return len(self.images) * 1000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = np.asarray(self.augment(self.images[index % len(self.images)]))
        views = [self.normalize(np.rot90(image, turns).copy()) for turns in range(ROTATIONS)]
        return torch.stack(views), torch.arange(ROTATIONS)


def _features(case: Case) -> tuple[Callable[[], object], int, float]:
    model = timm.create_model(MODEL, pretrained=True).eval().to(memory_format=torch.channels_last)
    images = _images(case.size, 1024)
    cfg = timm.get_pretrained_cfg(MODEL)
    autocast = autocast_type(case.precision)

    def prepare(batch: torch.Tensor) -> torch.Tensor:
        return normalize(batch, cfg.mean, cfg.std).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        extract_features(
            model, images, ["block2"], prepare=prepare, batch_size=case.images, autocast=autocast, dtype=torch.bfloat16
        )

    return step, len(images), flop_per_image(case.size, training=False)


def _product(case: Case) -> tuple[Callable[[], object], int, float]:
    dtype = autocast_type(case.precision) or torch.float32
    a, b = (torch.randn(case.size, case.size).to(dtype) for _ in range(2))
    repeats = min(1000, max(1, (4096 // case.size) ** 3))

    def step() -> None:
        for _ in range(repeats):
            a @ b

    return step, repeats, 2.0 * case.size**3


def flop_per_image(size: int, training: bool) -> float:
    """FLOP that an image takes in all of the network: forward, and in training backward too."""
    model = timm.create_model(MODEL, num_classes=ROTATIONS)
    images = torch.zeros(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        if training:
            rotation_loss(model, images).backward()
        else:
            model.eval()(images)
    return counter.get_total_flops() / (ROTATIONS if training else 1)


def _images(size: int, count: int) -> torch.Tensor:
    images = read_images(find_images(SAMPLES), size)
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]


def measure_speed(rounds: int = 3) -> dict[str, Any]:
    """All figures of the report, as plain values.

    The naive pipeline and ours are taken in turns, ``rounds`` times, and so are features and matrix products; medians
    are compared.
    """
    warn_if_emulated("bf16", "cpu")
    headline = {
        "naive": Case("naive", precision="fp32", keep_blocks=False),
        "training": Case("training"),
        "training without kept blocks": Case("training", keep_blocks=False),
        "training in fp32": Case("training", precision="fp32"),
        "features": Case("features", images=128),
        "features without kept blocks": Case("features", images=128, keep_blocks=False),
        **{f"product {size}": Case("product", size=size) for size in GEMM_SIZES},
        **{f"product {size} in fp32": Case("product", size=size, precision="fp32") for size in GEMM_SIZES},
    }
    speeds: dict[str, list[Speed]] = {name: [] for name in headline}
    for name in in_turns(headline, rounds):
        speeds[name].append(measure(headline[name]))
    return {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "commit": current_commit(),
        "versions": library_versions(),
        "rounds": rounds,
        "cases": {name: {**asdict(headline[name]), **_plain(speeds[name])} for name in headline},
    }


def in_turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """What to measure next, every other round backwards, with a progress bar: other load meets all of them alike."""
    order = list(names)
    with tqdm(total=rounds * len(order), unit="measurement") as bar:
        for number in range(rounds):
            for name in order if number % 2 == 0 else reversed(order):
                bar.set_description(name)
                yield name
                bar.update()


def _plain(speeds: list[Speed]) -> dict[str, float]:
    return {
        "images_per_second": statistics.median(speed.images_per_second for speed in speeds),
        "slowest": min(speed.images_per_second for speed in speeds),
        "fastest": max(speed.images_per_second for speed in speeds),
        "flop": speeds[0].flop,
        "peak_bytes": max(speed.peak_bytes for speed in speeds),
    }
