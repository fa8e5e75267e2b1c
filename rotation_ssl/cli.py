"""List, fetch, verify and convert weights, and compute features of a folder of images.

    rotation-ssl list                          all published weights, and which are on this machine
    rotation-ssl info rotnet_nin.cifar10       what is known of one
    rotation-ssl fetch TAG                     put it into the cache: later loads need no network
    rotation-ssl verify [TAG | FILE]           hash again, and compare golden outputs
    rotation-ssl convert FILE -o FOLDER        other people's checkpoints, for timm's local-dir:
    rotation-ssl features IMAGES -o FILE       features of a layer for every image of a folder

TAG is a name like rotnet_nin.cifar10. With --json a command prints what a program would read. Exit status: 1 when
something does not verify, 2 for bad input and for what cannot be had.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.data import resolve_model_data_config
from tqdm import tqdm

import rotation_ssl
from rotation_ssl import sources, zoo
from rotation_ssl.checkpoints import read_checkpoint
from rotation_ssl.convert import AUTHORS, convert, write_folder
from rotation_ssl.features import POOLS, extract_features, layer_modules
from rotation_ssl.golden import GOLDEN_TOLERANCE, golden_difference, golden_file
from rotation_ssl.images import find_images, normalize, read_images


def describe(name: str) -> dict[str, Any]:
    """An entry of the manifest with 'name', and 'here': the file on this machine, None when it is not there.

    Of weights of a release 'fetched' is what was recorded when they were downloaded.

    Raises:
        ValueError: no such name.
    """
    if name not in zoo.manifest():
        raise ValueError(f"no published weights {name!r}; there are: {', '.join(sorted(zoo.manifest()))}")
    here = zoo.cached_file(name)
    described = {"name": name, **zoo.manifest()[name], "here": str(here) if here else None}
    if described["source"] == "release":
        described["fetched"] = sources.read_record(name)
    return described


def verify_tag(name: str) -> dict[str, Any]:
    """Hash published weights that are on this machine, and run them: 'name', 'file', 'holds', 'why'.

    Weights that are not here are not fetched: 'holds' is None.
    """
    file = zoo.cached_file(name)
    if file is None and zoo.manifest()[name]["source"] != "bundled":
        return {"name": name, "file": None, "holds": None, "why": f"not here; rotation-ssl fetch {name}"}
    wrong, known = _hash_difference(name, file)
    if wrong:
        return {"name": name, "file": str(file), "holds": False, "why": wrong}
    if not golden_file(name).is_file():
        return {"name": name, "file": str(file), "holds": True, "why": f"{known}; no golden outputs to compare"}
    furthest = golden_difference(name)
    return {
        "name": name,
        "file": str(file),
        "holds": furthest < GOLDEN_TOLERANCE,
        "why": f"{known}; golden outputs differ by {furthest:.1e}, allowed are {GOLDEN_TOLERANCE:g}",
    }


def verify_file(path: Path) -> dict[str, Any]:
    """Which published weights a file or folder holds; 'holds' is None for weights that nobody published.

    Raises:
        ValueError: it cannot be read as weights, or holds values that are not finite.
    """
    folder_config = path / "config.json"
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    digest = sources.sha256_of(file)
    for name, entry in zoo.manifest().items():
        release = entry["source"] == "release"
        record = sources.read_record(name) or {} if release else entry
        if record.get("sha256") == digest:
            told = "as recorded when it was fetched" if release else "as published"
            return {"name": name, "file": str(file), "holds": True, "why": f"sha256 {digest}, {told}"}
    config = json.loads(folder_config.read_text()) if path.is_dir() and folder_config.is_file() else {}
    expected = config.get("sha256") if isinstance(config, dict) else None
    if expected and expected != digest:
        return {"name": None, "file": str(file), "holds": False, "why": f"sha256 {digest}, config.json has {expected}"}
    tensors = dict(_tensors(read_checkpoint(file)))
    if not tensors:
        raise ValueError(f"{file} holds no tensors")
    broken = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{file} holds values that are not finite in {', '.join(broken[:3])}")
    why = f"sha256 {digest}, as its config.json says; not published" if expected else f"sha256 {digest}; not published"
    return {"name": None, "file": str(file), "holds": True if expected else None, "why": why}


def folder_features(
    folder: Path,
    output: Path,
    model_name: str,
    layers: Sequence[str],
    pool: str,
    grid: int,
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    """Features of every image below a folder, written as safetensors: (N, D) by layer, N in the order of 'files'.

    The file's metadata has 'files' (JSON, relative to the folder), 'model', 'pool' and 'grid'.

    Raises:
        ValueError: no images, one that does not decode, no such model, weights, layer or device, or no folder to write
            the output to.
    """
    files = find_images(folder)
    if not output.parent.is_dir():
        raise ValueError(f"{output} cannot be written: {output.parent} is not a folder")
    model = _create(model_name)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); give another") from error
    name = f"{model_name.split('.', 1)[0]}.{model.pretrained_cfg.get('tag')}"
    layers = layers or [zoo.manifest()[name]["recommended_layer"]] if name in zoo.manifest() else layers
    if not layers:
        raise ValueError(f"{model_name} has no recommended layer: give --layers, of {', '.join(layer_modules(model))}")
    cfg = resolve_model_data_config(model)
    parts: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    with tqdm(total=len(files), desc="features", unit="img", mininterval=0.5) as bar:
        for start in range(0, len(files), batch_size):
            chosen = files[start : start + batch_size]
            batch = normalize(read_images(chosen, cfg["input_size"][-1]), cfg["mean"], cfg["std"])
            for layer, part in extract_features(model, batch, layers, pool=pool, grid=grid).items():
                parts[layer].append(part)
            bar.update(len(chosen))
    features = {layer: torch.cat(part) for layer, part in parts.items()}
    metadata = {
        "files": json.dumps([file.relative_to(folder).as_posix() for file in files]),
        "model": name if name in zoo.manifest() else model_name,
        "pool": pool,
        "grid": str(grid),
    }
    sources.replace_file(output, lambda path: path.write_bytes(save(features, metadata)))
    shapes = {layer: list(tensor.shape) for layer, tensor in features.items()}
    return {"file": str(output), "model": metadata["model"], "images": len(files), "shapes": shapes}


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint, whatever is around them."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _tensors(part, f"{name}[{i}]")


def _hash_difference(name: str, file: Path | None) -> tuple[str, str]:
    """What is wrong with the bytes of published weights, and how far good ones are known."""
    entry = zoo.manifest()[name]
    if file is None:
        return f"{entry['file']} is missing from the package; reinstall rotation-ssl", ""
    if entry["source"] == "release":
        record = sources.read_record(name)
        assert record is not None
        return sources.difference(file, record["sha256"], record["size"]), "sha256 as recorded when it was fetched"
    return sources.difference(file, entry["sha256"], entry["size"]), "sha256 as published"


def _create(model_name: str) -> Any:
    if not timm.is_model(model_name.split(".", 1)[0]) and ":" not in model_name:
        raise ValueError(f"no model {model_name!r}; there are {', '.join(timm.list_models('rotnet_*'))}, and timm's")
    try:
        return timm.create_model(model_name, pretrained=True)
    except RuntimeError as error:
        raise ValueError(f"{model_name} cannot be had ({str(error).splitlines()[0]})") from error


def _list(args: argparse.Namespace) -> int:
    described = [describe(name) for name in zoo.manifest()]
    if args.json:
        print(json.dumps(described, indent=1))
        return 0
    for entry in described:
        here = ("in the package" if entry["source"] == "bundled" else "cached") if entry["here"] else "not here"
        size = f"{entry['size'] / 1e6:.1f} MB" if entry["size"] else ""
        accuracy = entry["metrics"].get("rotation accuracy")
        measured = f"rotation accuracy {100 * accuracy:.2f} %" if accuracy else "not measured"
        print(f"{entry['name']:30s} {here:15s} {size:>9s}  {measured:26s}  {entry['data']}")
    return 0


def _info(args: argparse.Namespace) -> int:
    entry = describe(args.tag)
    if args.json:
        print(json.dumps(entry, indent=1))
        return 0
    for key, value in entry.items():
        if isinstance(value, dict):
            print(f"{key}:", *(f"{k}: {v}" for k, v in value.items()), sep="\n    ")
        else:
            unknown = "not on this machine" if key == "here" else "not known"
            print(f"{key}: {unknown if value is None else value}")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    file = zoo.weights_file(args.tag, accept_new_hash=args.accept_new_hash)
    result = {"name": args.tag, "file": str(file), "sha256": sources.sha256_of(file), "size": file.stat().st_size}
    print(json.dumps(result, indent=1) if args.json else f"{args.tag}: {file}\nsha256 {result['sha256']}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    if args.what is None:
        results = [verify_tag(name) for name in zoo.manifest()]
    elif args.what in zoo.manifest():
        results = [verify_tag(args.what)]
    elif Path(args.what).exists():
        results = [verify_file(Path(args.what))]
    else:
        raise ValueError(f"{args.what} is neither published weights ({', '.join(zoo.manifest())}) nor a file")
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        verdicts = {True: "holds", False: "BROKEN", None: "unknown"}
        for result in results:
            print(f"{verdicts[result['holds']]:8s} {result['name'] or result['file']}: {result['why']}")
    return 1 if any(result["holds"] is False for result in results) else 0


def _convert(args: argparse.Namespace) -> int:
    converted = convert(read_checkpoint(args.file, args.epoch))
    tag = args.tag or {AUTHORS: "gidaris", "torchvision-style": "torchvision"}.get(
        converted.origin, converted.origin.lower()
    )
    provenance = {"file": args.file.name, "file_sha256": sources.sha256_of(args.file), "converter": _version()}
    write_folder(converted, args.output, tag, provenance)
    result = {
        "folder": str(args.output),
        "model": converted.model,
        "num_classes": converted.num_classes,
        "origin": converted.origin,
        "left_out": list(converted.left_out),
    }
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{converted.model} with {converted.num_classes} classes, of {converted.origin}: {args.output}")
    if converted.left_out:
        print(f"left out: {', '.join(converted.left_out)}")
    print(f"load it: timm.create_model('local-dir:{args.output}', pretrained=True), after `import rotation_ssl`")
    return 0


def _features(args: argparse.Namespace) -> int:
    result = folder_features(
        args.images, args.output, args.model, args.layers or [], args.pool, args.grid, args.batch_size, args.device
    )
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    shapes = ", ".join(f"{layer} {tuple(shape)}" for layer, shape in result["shapes"].items())
    print(f"{result['file']}: {shapes} of {result['images']:,} images by {result['model']}")
    return 0


def _version() -> str:
    return f"rotation_ssl {rotation_ssl.__version__}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rotation-ssl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.add_argument("--json", action="store_true", help="print what a program would read")
        added.set_defaults(run=run)
        return added

    command("list", _list, "all published weights, and which of them are on this machine")
    added = command("info", _info, "what is known of one: source, hashes, licence, recipe, data, input, numbers")
    added.add_argument("tag", metavar="TAG", help="for example rotnet_nin.cifar10")
    added = command("fetch", _fetch, "put weights into the cache, verified, so that later loads need no network")
    added.add_argument("tag", metavar="TAG", help="for example rotnet_nin.gidaris_cifar10")
    added.add_argument(
        "--accept-new-hash",
        action="store_true",
        help="weights of a release, which has no published hash: download again and remember the hash it has now",
    )
    added = command("verify", _verify, "hash weights on this machine again, and compare their golden outputs")
    added.add_argument("what", nargs="?", metavar="TAG|FILE", help="a name, a file or a folder [all that are here]")
    added = command("convert", _convert, "turn another project's checkpoint into a folder that timm's local-dir: takes")
    added.add_argument(
        "file", type=Path, metavar="FILE", help="of the authors, VISSL, mmselfsup, or a ResNet; .tar.gz too"
    )
    added.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="new, or empty")
    added.add_argument("--epoch", type=int, help="which of an archive's checkpoints [the last]")
    added.add_argument("--tag", help="name of the weights, as in model.tag [whose form they have]")
    added = command("features", _features, "features of a layer for every image below a folder, as safetensors")
    added.add_argument("images", type=Path, metavar="IMAGES", help="a folder; folders in it too")
    added.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    added.add_argument("--model", default="rotnet_nin", help="model or model.tag, hf-hub: or local-dir: [%(default)s]")
    added.add_argument("--layers", nargs="+", metavar="LAYER", help="[the one recommended for the weights]")
    added.add_argument("--pool", default="avg", choices=[pool for pool in POOLS if pool], help="[%(default)s]")
    added.add_argument("--grid", type=int, default=1, help="pool to so many cells a side [%(default)s]")
    added.add_argument("--batch-size", type=int, default=64, help="images a batch [%(default)s]")
    added.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps [%(default)s]")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
