"""How fast features of photographs are written: against timm's own way, and against decoding and the network alone.

Every measurement is a fresh process that reads the same photographs, with as many data-loading workers.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import ImageDataset, create_loader, resolve_model_data_config
from torch import nn

import rotation_ssl
from rotation_ssl.embedding import embed
from rotation_ssl.embedding.local import embed_shards, make_extractor
from rotation_ssl.embedding.parts import Manifest
from rotation_ssl.embedding.sources import find_shards
from rotation_ssl.images import OVERSIZE, find_images
from rotation_ssl.machine import device_name, keep_large_blocks, library_versions
from rotation_ssl.models import load_model, weights_digest
from rotation_ssl.precision import autocast_type, resolve_precision
from training.reporting.rows import current_commit
from training.studies.speed import in_turns

# the last layer: timm's forward_features ends there
MODEL, LAYER, WIDTH, BATCH = "rotnet_alexnet.photos", "conv5", 256, 64


def by_timm(images: Path, output: Path, workers: int) -> None:
    """As timm's users do: its dataset, its loader, its transform, forward_features, the mean over the map."""
    model = load_model(MODEL, "cpu").eval()
    cfg = resolve_model_data_config(model)
    loader = create_loader(
        ImageDataset(str(images)), cfg["input_size"], BATCH, use_prefetcher=False, num_workers=workers,
        interpolation=cfg["interpolation"], mean=cfg["mean"], std=cfg["std"], crop_pct=cfg["crop_pct"],
    )  # fmt: skip
    dtype = autocast_type(resolve_precision("auto", "cpu"))
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        parts = [model.forward_features(batch).mean((2, 3)).float().numpy() for batch, _ in loader]
    np.save(output / "features.npy", np.concatenate(parts))


def by_us(images: Path, output: Path, workers: int) -> None:
    """As `rotation-ssl features` does."""
    keep_large_blocks()
    embed(images, output, MODEL, layers=[LAYER], workers=workers, batch_size=BATCH)


def decoding(images: Path, output: Path, workers: int) -> None:
    """The same without a network: its features are zeros."""
    manifest = _manifest(images, nn.Identity())
    shards = find_shards(manifest.source, manifest.shard_size)
    zeros = {LAYER: torch.zeros(BATCH, WIDTH)}
    for _ in embed_shards(shards, output, manifest, lambda pixels: zeros, workers):
        pass


def network(images: Path, output: Path, workers: int) -> None:
    """The same without images: as many are noise, decoded already."""
    keep_large_blocks()
    model = load_model(MODEL, "cpu")
    manifest = _manifest(images, model)
    extract = make_extractor(model, manifest)
    pixels = torch.randint(0, 256, (BATCH, manifest.size, manifest.size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for _ in range(-(-len(find_images(images)) // BATCH)):
        extract(pixels)


WAYS: dict[str, Callable[[Path, Path, int], None]] = {
    "timm": by_timm,
    "ours": by_us,
    "decoding": decoding,
    "network": network,
}


def measure(way: str, images: Path, workers: int) -> float:
    """Images a second of one way, in a process of its own, from its first import of the network to the last part."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return len(find_images(images)) / pool.submit(_seconds, way, images, workers).result()


def measure_embedding(folder: Path, count: int, workers: int, rounds: int) -> dict[str, Any]:
    """The rates of all ways, taken in turns, as plain values.

    Args:
        folder: of photographs, searched recursively.
        count: of photographs that are used, the first ones.
        workers: data-loading workers.
        rounds: measurements of each way; their median counts.
    """
    found = find_images(folder)[:count]
    if len(found) < count:
        raise ValueError(f"{folder} holds {len(found):,} photographs, not {count:,}: give fewer with --images")
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as links:
        for number, file in enumerate(found):
            Path(links, f"{number:06d}{file.suffix}").symlink_to(file.absolute())
        for way in in_turns(WAYS, rounds):
            rates[way].append(measure(way, Path(links), workers))
    return {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "workers": workers,
        "images": count,
        "model": MODEL,
        "precision": resolve_precision("auto", "cpu"),
        "rounds": rounds,
        "commit": current_commit(),
        "versions": library_versions(),
        "images_per_second": {way: statistics.median(values) for way, values in rates.items()},
    }


def _seconds(way: str, images: Path, workers: int) -> float:
    with tempfile.TemporaryDirectory() as output:
        started = time.perf_counter()
        WAYS[way](images, Path(output), workers)
        return time.perf_counter() - started


def _manifest(images: Path, model: nn.Module) -> Manifest:
    cfg = timm.get_pretrained_cfg(MODEL)
    return Manifest(
        source=str(images.absolute()), shard_size=10_000, format="parquet", model=MODEL,
        weights_sha256=weights_digest(model), layers={LAYER: WIDTH}, pool="avg", grid=1,
        size=cfg.input_size[-1], mean=list(cfg.mean), std=list(cfg.std),
        precision=resolve_precision("auto", "cpu"), dtype="float32", sha1=False, batch_size=BATCH,
        version=rotation_ssl.__version__, decoded_side=OVERSIZE * cfg.input_size[-1],
    )  # fmt: skip
