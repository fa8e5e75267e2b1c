"""One run from a source of images to a folder of parts."""

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from timm.data import resolve_model_data_config

import rotation_ssl
from rotation_ssl.embedding.cluster import embed_on_cluster
from rotation_ssl.embedding.files import absolute, check_local
from rotation_ssl.embedding.local import Done, embed_shards, make_extractor
from rotation_ssl.embedding.parts import (
    DTYPES,
    FORMATS,
    Manifest,
    count_rows,
    find_parts,
    locked,
    merge_errors,
    part_digest,
    part_name,
    require_pyarrow,
    start,
)
from rotation_ssl.embedding.sources import Shard, describe_no_images, find_shards
from rotation_ssl.features import POOLS
from rotation_ssl.images import OVERSIZE
from rotation_ssl.machine import cpus
from rotation_ssl.models import DEFAULT_MODEL, load_model, model_name, recommended_layer, weights_digest
from rotation_ssl.precision import resolve_precision
from rotation_ssl.progress import progress

ENGINES = ("local", "ray")
SHARD_SIZE = 10_000  # images


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a folder of features holds after a run: parts, images with features, and errors.

    ``not_read`` has the number of other files in a source that is a folder, by their suffix.
    """

    parts: int
    images: int
    errors: int
    not_read: dict[str, int]


def embed(
    source: str | Path,
    output: str | Path,
    model: str = DEFAULT_MODEL,
    *,
    layers: Sequence[str] | None = None,
    pool: str = "avg",
    grid: int = 1,
    engine: str = "local",
    format: str = "parquet",
    shard_size: int = SHARD_SIZE,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "cpu",
    precision: str = "auto",
    dtype: str = "float32",
    sha1: bool = False,
    resume: bool = False,
    address: str | None = None,
) -> Summary:
    """Write the features of all images of a source into a folder, in parts.

    Broken images are listed in errors.parquet. ``resume=True`` continues an interrupted run.

    Args:
        source: a folder, searched recursively; tar files (``{000..999}.tar``); parquet files with a column of bytes or
            a column 'path'. Paths, or URLs that fsspec opens.
        output: folder of the parts, local or mounted; with Ray one that all machines see.
        model: timm name: model, model.tag, ``hf-hub:...`` or ``local-dir:...``.
        layers: None: the recommended layer of the weights.
        pool: 'avg', 'max' or 'flatten'.
        grid: pool to grid x grid cells.
        engine: 'local' or 'ray'; both give the same parts.
        format: 'parquet', 'safetensors', or 'npy', which takes one layer.
        shard_size: images in a part; a tar file is always one part.
        batch_size: images in a batch.
        workers: data-loading worker processes, with Ray of each actor; None: one for each CPU, and none with Ray.
        device: 'cpu', 'cuda', 'mps'.
        precision: 'fp32', 'bf16', or 'auto': bf16 if the hardware supports it.
        dtype: 'float32' or 'float16', of what is stored.
        sha1: also store the sha1 of the images' bytes.
        resume: keep the parts that exist and write the others.
        address: address of a Ray cluster; None: start one on this machine.

    Raises:
        ImportError: pyarrow, or ray for that engine, is not installed.
        ValueError: source, model and output do not fit, another run writes to the folder, or it has other settings.
        OSError: the source cannot be read, a part cannot be written, or a process was killed.
    """
    check_local(output)
    _check_choices(
        engine=(engine, ENGINES),
        format=(format, FORMATS),
        dtype=(dtype, DTYPES),
        pool=(pool, POOLS[:-1]),
        precision=(precision, ("auto", "fp32", "bf16")),
    )
    if shard_size < 1 or (workers or 0) < 0:
        raise ValueError(f"shard_size must be at least 1 and workers 0, got {shard_size} and {workers}")
    if min(grid, batch_size) < 1:
        raise ValueError(f"grid and batch_size must be at least 1, got {grid} and {batch_size}")
    _check_engine(engine, address)
    model = _absolute(model)
    folder, loaded = Path(output).absolute(), load_model(model, device if engine == "local" else "cpu")
    chosen = list(layers or [recommended_layer(loaded, model)])
    if format == "npy" and len(chosen) > 1:
        raise ValueError(f"the format npy takes one layer, not {', '.join(chosen)}; give one, or another format")
    cfg = resolve_model_data_config(loaded)
    manifest = Manifest(
        source=absolute(str(source)), shard_size=shard_size, format=format, model=model_name(loaded, model),
        weights_sha256=weights_digest(loaded), layers=dict.fromkeys(chosen, 0), pool=pool, grid=grid,
        size=cfg["input_size"][-1], mean=list(cfg["mean"]), std=list(cfg["std"]),
        precision=_precision(precision, device), dtype=dtype, sha1=sha1, batch_size=batch_size,
        version=rotation_ssl.__version__, decoded_side=OVERSIZE * cfg["input_size"][-1],
    )  # fmt: skip
    extract = make_extractor(loaded, manifest)
    widths = {layer: part.shape[1] for layer, part in extract(torch.zeros(1, 3, manifest.size, manifest.size)).items()}
    manifest = dataclasses.replace(manifest, layers=widths)
    if next(find_shards(manifest.source, shard_size), None) is None:
        raise ValueError(describe_no_images(str(source)))

    def write(shards: Iterable[Shard], show: Callable[[int], object]) -> Iterator[Done]:
        if engine == "local":
            return embed_shards(shards, folder, manifest, extract, cpus() if workers is None else workers, show)
        return embed_on_cluster(shards, folder, manifest, model, device, workers or 0, address, show)

    with locked(folder):
        start(folder, manifest, resume)
        return _write_missing(folder, manifest, write)


def _write_missing(folder: Path, manifest: Manifest, write: Callable[..., Iterator[Done]]) -> Summary:
    """Write the parts that are not there yet; ``write`` takes the shards and what counts their images."""
    there = set(find_parts(folder, manifest.format))
    others: Counter[str] = Counter()
    with progress("features", _count_missing(folder, manifest, there, others)) as bar:
        missing = (shard for shard in find_shards(manifest.source, manifest.shard_size) if shard.number not in there)
        for part in write(missing, bar.update):
            bar.set_postfix_str(part_name(part.part), refresh=False)
    parts, rows = len(find_parts(folder, manifest.format)), count_rows(folder, manifest.format)
    return Summary(parts, rows, merge_errors(folder), dict(sorted(others.items())))


def _absolute(model: str) -> str:
    """A folder's name as any process finds it, wherever it is started; another name as it is."""
    kind, separator, folder = model.partition(":")
    return f"{kind}:{Path(folder).absolute()}" if separator and kind == "local-dir" else model


def _check_choices(**choices: tuple[str, Sequence[str | None]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _check_engine(engine: str, address: str | None) -> None:
    if address and engine != "ray":
        raise ValueError(f"address {address} is for the engine ray: give the engine ray too")
    require_pyarrow()
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ImportError("--engine ray needs ray: pip install 'rotation-ssl[scale]'")


def _precision(precision: str, device: str) -> str:
    if precision == "auto" and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"precision auto depends on the GPU, and there is none here: give fp32 or bf16 for {device}")
    return resolve_precision(precision, device)


def _count_missing(folder: Path, manifest: Manifest, there: set[int], others: Counter[str]) -> int | None:
    """The number of images without a part; None for tar files, whose images nobody has counted.

    ``others`` counts the files that are no images.

    Raises:
        ValueError: a part was made of other images than the source has now.
    """
    images, number, is_known = 0, 0, True
    for shard in find_shards(manifest.source, manifest.shard_size, others):
        if shard.number not in there:
            images += len(shard.names) + shard.rows[1] - shard.rows[0]
            is_known &= shard.kind != "tar"
        elif part_digest(folder, shard.number) != shard.digest:
            raise ValueError(f"{manifest.source} has changed since {part_name(shard.number)} was made of it; "
                             "give another --output")  # fmt: skip
        number += 1
    if more := sorted(part for part in there if part >= number):
        raise ValueError(f"{manifest.source} has fewer images than {part_name(more[0])} was made of; "
                         "give another --output")  # fmt: skip
    return images if is_known else None
