"""rotation-ssl features."""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import nn

from rotation_ssl.cli import feature_parts
from rotation_ssl.cli.options import add_command, add_device, check_output, positive
from rotation_ssl.embedding.files import check_local
from rotation_ssl.embedding.parts import FORMATS as PART_FORMATS
from rotation_ssl.features import POOLS, extract_features
from rotation_ssl.files import replace_file, write_csv
from rotation_ssl.images import OVERSIZE, count_suffixes, find_files, large_images_allowed, normalize, read_images
from rotation_ssl.machine import MALLOPT_HELP, keep_large_blocks
from rotation_ssl.messages import counted, printable, some
from rotation_ssl.models import DEFAULT_MODEL, load_model, model_name, recommended_layer
from rotation_ssl.progress import progress

FORMATS = ("safetensors", "npz", "csv")
DETAILS = f"""

Formats, by the suffix of FILE:
    .safetensors  a tensor (N, D) for each layer; the metadata has 'files' (JSON), 'model', 'pool' and 'grid'
    .npz          an array (N, D) for each layer, and 'files' (N,)
    .csv          a row for each image: 'file', then the columns LAYER_0, LAYER_1, ... of each layer;
                  pandas.read_csv(FILE, index_col="file") reads it

File names are relative to IMAGES, in the order of the rows. Broken images are skipped and listed, and the exit status
is then 1. With --strict, the first broken image is an error and nothing is written.

If the output is a folder (-o FOLDER/, or a name without a suffix), features are written in parts, for any number of
images:
    manifest.json, part-00000.parquet, part-00001.parquet, ..., and errors.parquet with the broken images
IMAGES may then also be tar files, '{{000..999}}.tar'; parquet files with a column of bytes or a 'path' column; or a URL
that fsspec opens. Parts that exist are complete, and --resume continues an interrupted run. --format is parquet, npy or
safetensors; with npy and safetensors, part-00000.parquet has the paths of part 0, and so on. Writing parts requires the
`scale` extra.

{MALLOPT_HELP}
"""


def add(commands: Any) -> None:
    """Add the command."""
    added = add_command(commands, "features", run, "extract features from a folder of images", DETAILS)
    added.add_argument("images", metavar="IMAGES", help="folder of images, searched recursively; see above")
    added.add_argument("-o", "--output", required=True, metavar="FILE", help="output file, or FOLDER/ for parts")
    added.add_argument(
        "--format",
        choices=sorted({*FORMATS, *PART_FORMATS}),
        help="output format [from the suffix of FILE; parquet for FOLDER/]",
    )
    added.add_argument("--force", action="store_true", help="replace FILE if it exists")
    added.add_argument("--strict", action="store_true", help="stop at the first broken image")
    added.add_argument(
        "--model", default=DEFAULT_MODEL, help="timm name: model, model.tag, hf-hub:... or local-dir:... [%(default)s]"
    )
    added.add_argument(
        "--layers", nargs="+", metavar="LAYER", help="feature layers [the recommended layer of the weights]"
    )
    added.add_argument(
        "--pool",
        default="avg",
        choices=[pool for pool in POOLS if pool],
        help="pooling of the feature maps [%(default)s]",
    )
    added.add_argument("--grid", type=positive, default=1, help="pool to GRID x GRID cells [%(default)s]")
    added.add_argument("--batch-size", type=positive, default=64, help="images per batch [%(default)s]")
    add_device(added)
    feature_parts.add_options(added)


@large_images_allowed()
def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    keep_large_blocks()
    if feature_parts.is_folder(args.output, FORMATS):
        return feature_parts.run(args)
    check_local(args.output, "file")
    feature_parts.check_no_options(args)
    feature_parts.check_source(args.images)
    args.images, args.output = Path(args.images), Path(args.output)
    images, others = find_files(args.images)
    check_output(args.output, images, args.force)
    check_suffix(args.output, args.format)
    model = load_model(args.model, args.device)
    layers = args.layers or [recommended_layer(model, args.model)]
    broken: dict[Path, str] = {}
    parts: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    for batch in read_batches(model, images, args.batch_size, None if args.strict else broken):
        for layer, part in extract_features(model, batch, layers, pool=args.pool, grid=args.grid).items():
            parts[layer].append(part)
    features = {layer: torch.cat(part) for layer, part in parts.items()}
    metadata = {
        "files": json.dumps([file_name(file, args.images) for file in images if file not in broken]),
        "model": model_name(model, args.model),
        "pool": args.pool,
        "grid": str(args.grid),
    }
    replace_file(args.output, lambda path: write(path, args.output.suffix.lower()[1:], features, metadata))
    result = {
        "file": str(args.output),
        "model": metadata["model"],
        "images": len(images) - len(broken),
        "shapes": {layer: list(tensor.shape) for layer, tensor in features.items()},
        "broken": {file_name(file, args.images): why for file, why in broken.items()},
        "not_read": dict(Counter(file.suffix.lower() for file in others)),
    }
    print(json.dumps(result, indent=1) if args.json else _report(result, others))
    return 1 if broken else 0


def check_suffix(file: Path, form: str | None) -> None:
    """Refuse a file whose suffix is of no format, or of another one than that asked for."""
    suffix = file.suffix.lower()
    if form and suffix != f".{form}":
        raise ValueError(f"{file} does not end in .{form}, as --format says; change one of them")
    if suffix[1:] not in FORMATS:
        raise ValueError(f"{file} ends in none of {', '.join(f'.{form}' for form in FORMATS)}; give another --output")


def read_batches(
    model: nn.Module, files: Sequence[Path], batch_size: int, broken: dict[Path, str] | None
) -> Iterator[torch.Tensor]:
    """The images as the model takes them, (at most batch_size, 3, H, H) each time, with a progress bar.

    What is wrong with images that cannot be read goes into ``broken``.

    Raises:
        ValueError: none of the images can be read, or, without ``broken``, one of them.
    """
    cfg = resolve_model_data_config(model)
    size = cfg["input_size"][-1]
    with progress("features", len(files)) as bar:
        for start in range(0, len(files), batch_size):
            read = []
            for file in files[start : start + batch_size]:
                try:
                    read.append(read_images([file], size, OVERSIZE * size))
                except ValueError as error:
                    if broken is None:
                        raise
                    broken[file] = str(error)
                bar.update()
            if read:
                yield normalize(torch.cat(read), cfg["mean"], cfg["std"])
    if broken and broken.keys() >= set(files):
        raise ValueError(f"none of the {len(files):,} images can be read: {broken[files[0]]}")


def write(file: Path, form: str, features: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write features (N, D) by layer, in one of :data:`FORMATS`."""
    files = json.loads(metadata["files"])
    arrays: dict[str, Any] = {layer: tensor.numpy() for layer, tensor in features.items()}
    if form == "safetensors":
        file.write_bytes(save(dict(features), dict(metadata)))
    elif form == "npz":
        with file.open("wb") as stream:
            np.savez(stream, files=np.array(files), **arrays)
    else:
        header = ["file", *(f"{layer}_{i}" for layer, array in arrays.items() for i in range(array.shape[1]))]
        # numpy writes a float32 with the fewest digits that give it back
        rows = ([name, *np.concatenate(row).astype(str)] for name, *row in zip(files, *arrays.values(), strict=True))
        write_csv(file, header, rows)


def file_name(file: Path, folder: Path) -> str:
    """What an image is called: its path below the folder."""
    return file.relative_to(folder).as_posix()


def kinds(others: Sequence[Path]) -> str:
    """What a folder has that is no image: '3 .gif files, 1 .txt file'."""
    return printable(count_suffixes(others), most=4096)


def _report(result: Mapping[str, Any], others: Sequence[Path]) -> str:
    shapes = ", ".join(f"{layer} {tuple(shape)}" for layer, shape in result["shapes"].items())
    lines = [f"{result['file']}: {shapes} of {result['images']:,} images by {result['model']}"]
    if others:
        lines.append(f"not read: {kinds(others)}")
    if broken := list(result["broken"]):
        lines.append(f"skipped {counted(len(broken), 'broken image')}: {some(broken)}")
    return "\n".join(lines)
