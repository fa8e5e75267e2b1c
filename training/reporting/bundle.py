"""A finished run becomes published weights: its files are copied into the package and entered into the manifest."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load, save
from timm.data import resolve_model_data_config

from rotation_ssl import zoo
from rotation_ssl.backbones.about import network_facts
from rotation_ssl.convert import misfits
from rotation_ssl.files import replace_bytes
from rotation_ssl.messages import counted
from rotation_ssl.pretraining.outputs import recorded_recipe
from rotation_ssl.zoo.golden import golden_file, golden_outputs
from training.recipes import RECIPES
from training.reporting.manifest import enter_manifest
from training.reporting.pages import FIGURES_DIR
from training.reporting.rows import RESULTS_DIR

DATA_NAMES = {
    "cifar10": "CIFAR-10, 50,000 training images (labels not used)",
    "photos": "114,334 training photographs of Imagenette, Imagewoof, MiniPlaces and Caltech-101 (labels not used)",
    "photo-views": "the 114,334 photographs of `rotnet_alexnet.photos`, those of objects more often (labels not used)",
}


def bundle(run_dir: Path, name: str, half: bool = False) -> None:
    """Copy a run's weights into the package as ``model.tag`` and enter them into the manifest.

    Everything is checked and computed before the first file is written, and the manifest is written last.

    Args:
        run_dir: output folder of the run.
        name: ``model.tag``.
        half: store the weights in half precision, in half as many bytes.
    """
    run = checked_run(run_dir, name)
    recipe = run["recipe"]
    network = name.split(".", 1)[0]
    weights = run_dir / "model.safetensors"
    # the size is the recipe's, not that of the weights that are bundled already or of the paper
    input_size = (3, *[RECIPES[recipe["name"]].input_size] * 2)
    overlay = {"file": str(weights), "input_size": input_size}
    model = timm.create_model(network, pretrained=True, pretrained_cfg_overlay=overlay)
    cfg = resolve_model_data_config(model)
    entry = {
        "source": "bundled",
        "file": f"{name}.safetensors",
        "license": "mit",
        "origin": "trained by this project",
        "recipe": recipe["name"],
        "data": DATA_NAMES[recipe["data"]],
        "rotated_images": run["rotated_images"],
        **(_begun_with(run) if recipe.get("pretrained") else {}),
        "seed": recipe["seed"],
        "commit": run["commit"],
        "recommended_layer": network_facts(network).recommended_layer,
        **{key: list(cfg[key]) for key in ("input_size", "mean", "std")},
        **({"model_args": dict(recipe["model_args"])} if recipe.get("model_args") else {}),
        **({"dtype": "fp16"} if half else {}),
        "metrics": {},
    }
    content = weights.read_bytes()
    if half:
        content = save({k: v.half() if v.is_floating_point() else v for k, v in load(content).items()})
    content = add_metadata(content, name, entry)
    entry |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    stored = load(content)
    if told := misfits(stored, model.state_dict()):
        raise ValueError(f"{run_dir} cannot be stored in half precision: it {told}; leave --half out")
    model.load_state_dict(stored)
    FIGURES_DIR.mkdir(parents=True, exist_ok=True)
    replace_bytes(FIGURES_DIR / f"{name}.curve.png", (run_dir / "curve.png").read_bytes())
    replace_bytes(golden_file(name), save(golden_outputs(model)))
    replace_bytes(RESULTS_DIR / f"{name}.run.json", (run_dir / "run.json").read_bytes())
    replace_bytes(zoo.WEIGHTS_DIR / entry["file"], content)
    enter_manifest(name, entry)


def _begun_with(run: Mapping[str, Any]) -> dict[str, Any]:
    """The weights that a run began with, as it recorded them: by now others may be published under their name.

    A run that is older than the record began with what is published now.
    """
    if "begun_with" in run:
        return {"begun_with": run["begun_with"]}
    name = run["recipe"]["model"]
    entry = zoo.manifest()[name]
    return {"begun_with": {"name": name, **{key: entry[key] for key in ("sha256", "rotated_images")}}}


def add_metadata(content: bytes, name: str, entry: Mapping[str, Any]) -> bytes:
    """A safetensors file that says which published weights it has, in the metadata of its header.

    safetensors itself writes several of them in an order that changes from run to run.
    """
    told = {key: str(entry.get(key, "")) for key in ("commit", "license", "recipe")}
    metadata = {"format": "pt", "layer": entry["recommended_layer"], "tag": name, **told}
    length = int.from_bytes(content[:8], "little")
    header = {**json.loads(content[8 : 8 + length]), "__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def checked_run(run_dir: Path, name: str) -> dict[str, Any]:
    """The run.json of a run whose weights may be published as ``model.tag``.

    Raises:
        ValueError: not a finished run, one of another model or of uncommitted code, one that held training images out
            or departed from its recipe, or one of other rotations than the four.
    """
    if not re.fullmatch(r"\w+\.[a-z0-9_]+", name) or re.match("random|paper", name.split(".")[1]):
        raise ValueError(f"{name!r} is no name for weights: give MODEL.TAG, a tag of a-z, 0-9 and _, such as cifar10")
    lacking = [file for file in ("model.safetensors", "run.json", "curve.png") if not (run_dir / file).is_file()]
    if lacking:
        raise ValueError(f"{run_dir} is not a finished run: it lacks {', '.join(lacking)}")
    run: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    if not isinstance(run, dict) or not {"recipe", "commit", "rotated_images"} <= run.keys():
        raise ValueError(f"{run_dir / 'run.json'} does not describe a run: give the output folder of a pretraining")
    recipe = run["recipe"]
    if recipe["model"].split(".", 1)[0] != name.split(".", 1)[0]:
        raise ValueError(f"{run_dir} is a run of {recipe['model']}, not of {name.split('.', 1)[0]}")
    if recipe["holdout"]:
        raise ValueError(f"{run_dir} held {counted(recipe['holdout'], 'image')} out: it is for tuning, not publishing")
    if recipe["data"] not in DATA_NAMES:
        raise ValueError(f"{run_dir} is of {recipe['data']}: weights are bundled of {', '.join(DATA_NAMES)}")
    if not network_facts(recipe["model"]).recommended_layer:
        raise ValueError(f"{run_dir} is of {recipe['model']}, of which no layer is recommended: enter it in its FACTS")
    departures = _departures(recipe)
    if departures:
        raise ValueError(f"{run_dir} departed from its recipe: {'; '.join(departures)}; only the seed may differ")
    if recipe["rotations"] != [0, 1, 2, 3]:
        raise ValueError(
            f"{run_dir} knows the rotations {recipe['rotations']}; published weights have the head of four"
        )
    if not re.fullmatch("[0-9a-f]{40}", run["commit"]):
        raise ValueError(f"{run_dir} was trained by commit {run['commit']!r}: commit, then train what is published")
    return run


def _departures(recipe: dict[str, Any]) -> list[str]:
    """What of a run's recipe differs from the named one; a field that an older run.json lacks had its default."""
    if recipe["name"] not in RECIPES:
        return [f"there is no recipe {recipe['name']!r}"]
    ours = RECIPES[recipe["name"]]
    named = json.loads(json.dumps(dataclasses.asdict(ours)))
    run = recorded_recipe(recipe)
    if named["precision"] == "auto" and run["precision"] in ("bf16", "fp32"):
        named["precision"] = run["precision"]  # what 'auto' was there
    run = {field: run[field] for field in named if field not in ("seed", "note")}
    return [f"{field} {named[field]} -> {value}" for field, value in run.items() if value != named[field]]
