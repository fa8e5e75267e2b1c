"""Published weights on the Hugging Face Hub: what a repository holds, and how it gets there whole.

A revision exists only after the upload, so the order is: create, upload what differs, read the revision, download it
again and compare, tag it, and only then write it into the manifest. Each step finds out what is done already: run
again, it goes on where it was interrupted, and uploads nothing that is there.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import timm
import torch
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load, save
from torch import nn

import rotation_ssl
from rotation_ssl import zoo
from rotation_ssl.convert import write_config
from rotation_ssl.features import layer_modules
from rotation_ssl.messages import first_line
from rotation_ssl.zoo.golden import GOLDEN_TOLERANCE, golden_file, golden_outputs
from training.reporting.pages import FIGURES, REPOSITORY, ROOT
from training.reporting.required import main_data
from training.reporting.rows import RESULTS_DIR, Row
from training.reporting.tables import evaluation_lines, select

CARD_TEMPLATE = Path(__file__).parent / "hub_card.md"
WEIGHTS = "model.safetensors"
GOLDEN = "golden.safetensors"
HUB_DATASETS = {"CIFAR-10": "cifar10", "Tiny-ImageNet": "zh-plus/tiny-imagenet"}


@dataclass(frozen=True)
class Upload:
    """Weights to be published as ``model.tag``: the manifest's entry of them, and the file's content."""

    name: str
    entry: dict[str, Any]
    content: bytes


def upload_of(name: str) -> Upload:
    """Weights of the manifest, from the package or their cache.

    Raises:
        ValueError: no such weights, or ones whose bytes the manifest does not know.
    """
    if not zoo.manifest().get(name, {}).get("sha256"):
        raise ValueError(f"{name} cannot be published: there are {', '.join(zoo.bundled())}, and folders of `convert`")
    return Upload(name, zoo.manifest()[name], zoo.read_weights(name))


def upload_of_folder(folder: Path, license_name: str, data: str, layer: str) -> Upload:
    """Weights of a folder that ``rotation-ssl convert`` wrote, with the manifest's entry that they are to get.

    Args:
        folder: with config.json and model.safetensors.
        license_name: of the weights, as the Hub names licences.
        data: what they were trained on.
        layer: recommended for features.

    Raises:
        ValueError: not such a folder, weights that do not fit, a model that this package does not have, or no licence,
            data or layer.
    """
    model = _model_of_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    architecture, tag = config["architecture"], config["pretrained_cfg"].get("tag")
    if config["num_classes"] != 4 or config.get("model_args", {}).get("fc_size", 4096) != 4096:
        raise ValueError(
            f"{folder} lacks the head of the four rotations, or fc6 and fc7: its name would load a network that has"
            " them; hand it on as a folder, for local-dir:"
        )
    if architecture not in timm.list_models("rotnet_*") or not tag:
        known = ", ".join(timm.list_models("rotnet_*"))
        raise ValueError(f"{folder} holds {architecture} (tag {tag}): published are {known}, with a tag")
    if not (license_name and data and layer):
        raise ValueError(f"publishing {folder} needs --license, --trained-on and --layer: the folder does not say them")
    if layer not in layer_modules(model):
        raise ValueError(f"{architecture} has no layer {layer}; it has {', '.join(layer_modules(model))}")
    content = (folder / WEIGHTS).read_bytes()
    published = zoo.manifest().get(f"{architecture}.{tag}")
    if published and published["sha256"] == hashlib.sha256(content).hexdigest():
        return Upload(f"{architecture}.{tag}", published, content)
    if published:
        raise ValueError(f"{architecture}.{tag} is published already, with other bytes: convert with another --tag")
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    provenance = config.get("provenance", {})
    name = f"{architecture}.{tag}"
    entry = {
        "source": "hub",
        "file": f"{name}.safetensors",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "license": license_name,
        "origin": f"converted from {provenance.get('origin', 'a checkpoint')}"
        + (f", sha256 {provenance['file_sha256']}" if "file_sha256" in provenance else ""),
        "recipe": "not this project's",
        "data": data,
        "recommended_layer": layer,
        **{key: list(cfg[key]) for key in ("input_size", "mean", "std")},
        "metrics": {},
    }
    return Upload(name, entry, content)


def hub_files(upload: Upload, repository: str, version: str, rows: Sequence[Row]) -> dict[str, bytes]:
    """What the Hub repository of some weights holds: file name -> content. The same weights and rows give the same.

    Raises:
        ValueError: weights that do not fit their model.
    """
    name, entry, state = upload.name, upload.entry, load(upload.content)
    architecture, tag = name.split(".", 1)
    config, model = _config(name, entry, upload.content, state)
    files = {
        WEIGHTS: upload.content,
        "config.json": config,
        GOLDEN: golden_file(name).read_bytes() if golden_file(name).exists() else save(golden_outputs(model)),
    }
    classifier = f"{model.pretrained_cfg['classifier']}."
    backbone = {key: value for key, value in state.items() if not key.startswith(classifier)}
    if len(backbone) < len(state):
        files["backbone.safetensors"] = save(backbone)
    run, curve = RESULTS_DIR / f"{name}.run.json", ROOT / FIGURES / f"{name}.curve.png"
    if run.exists():
        files["training.json"] = run.read_bytes()
    if curve.exists():
        files["curve.png"] = curve.read_bytes()
    text = Template(CARD_TEMPLATE.read_text()).substitute(
        name=name,
        model=architecture,
        tag=tag,
        repository=repository,
        version=version,
        code=REPOSITORY,
        sha256=entry["sha256"],
        size=f"{entry['size']:,}",
        head=", with the head of the four rotations; `backbone.safetensors` is without"
        if "backbone.safetensors" in files
        else "",
        data=entry["data"],
        origin=entry["origin"],
        input=" x ".join(map(str, entry["input_size"][1:])),
        mean=", ".join(f"{value:.4f}" for value in entry["mean"]),
        std=", ".join(f"{value:.4f}" for value in entry["std"]),
        layer=entry["recommended_layer"],
        training="\n".join(_training(entry, files)),
        evaluation="\n".join(_evaluation(name, rows)),
    )
    files["README.md"] = f"---\n{_card_data(name, entry, rows)}\n---\n\n{text}".encode()
    return files


def publish(upload: Upload, namespace: str, version: str, rows: Sequence[Row]) -> dict[str, str]:
    """Bring weights to the Hub and verify them there; returns what the manifest is to say of it.

    Nothing is uploaded that is there already; the version's tag is set once and never moved.

    Raises:
        OSError: the Hub cannot be reached, or refuses (no login, no permission, a commit in between).
        ValueError: it serves other bytes than were uploaded, the version's tag is at another revision, or this project
            has no public address for the card to point to.
    """
    if REPOSITORY.startswith("OWNER/"):
        raise ValueError(
            "cards on the Hub point to this project's public address: set REPOSITORY in training/reporting/pages.py"
        )
    repository = f"{namespace}/{upload.name}"
    files, api = hub_files(upload, repository, version, rows), HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        revision = _revision(api, repository, version)
        if revision is not None:
            _keep_golden(repository, revision, files)
            if changed := _differing(repository, revision, files):
                raise ValueError(
                    f"{version} of {repository} has other {', '.join(changed)}, and a version never moves: raise it"
                    " (--version)"
                )
        else:
            head = _revision(api, repository, "main")
            assert head is not None
            _keep_golden(repository, head, files)
            # the client leaves out what is there already
            operations = [CommitOperationAdd(path, content) for path, content in files.items()]
            message = f"{upload.name} {version}"
            revision = api.create_commit(repository, operations, commit_message=message, parent_commit=head).oid
            if changed := _differing(repository, revision, files):
                raise ValueError(
                    f"{', '.join(changed)} of {repository}@{revision} is not what was uploaded: nothing was published"
                )
        api.create_tag(repository, tag=version, revision=revision, exist_ok=True)
        tagged = api.model_info(repository, revision=version).sha
    except HfHubHTTPError as error:
        raise ConnectionError(f"publishing {repository} failed: {_reason(error)}; run it again") from error
    except RuntimeError as error:
        # an upload of a large file that failed
        cause = error.__cause__
        reason = _reason(cause) if isinstance(cause, HfHubHTTPError) else first_line(cause or error)
        raise ConnectionError(f"publishing {repository} failed: {reason}; run it again") from error
    except Exception as error:
        # the client lets its HTTP library's errors through
        if "httpx" not in type(error).__module__:
            raise
        raise ConnectionError(
            f"publishing {repository} failed: no connection ({first_line(error)}); run it again"
        ) from error
    if tagged != revision:
        raise ValueError(
            f"{version} of {repository} is revision {tagged}, not {revision}: someone else set it meanwhile"
        )
    return {"repository": repository, "revision": revision, "version": version, "file": WEIGHTS}


def current_version() -> str:
    """The Hub tag of this version of the package: 'v0.1' for 0.1.2."""
    return "v" + ".".join(rotation_ssl.__version__.split(".")[:2])


def _config(name: str, entry: dict[str, Any], content: bytes, state: dict[str, torch.Tensor]) -> tuple[bytes, Any]:
    """config.json as timm's hf-hub: takes it, without the package's registry, and the model."""
    architecture, tag = name.split(".", 1)
    overlay = {"state_dict": state, **{key: tuple(entry[key]) for key in ("input_size", "mean", "std")}}
    args = {"fc_size": 0} if architecture == "rotnet_alexnet" and "head.fc6.0.weight" not in state else {}
    model = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **args).eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        cfg, provenance = {"tag": tag, "license": entry["license"]}, {key: entry[key] for key in ("origin", "recipe")}
        write_config(model, content, file, cfg, provenance)
        return file.read_bytes(), model


def _card_data(name: str, entry: dict[str, Any], rows: Sequence[Row]) -> str:
    results = []
    for key, value in entry["metrics"].items():
        metric, _, data = key.partition(" on ")
        dataset, _, split = (data or main_data(name)).rpartition(" ")
        results.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=HUB_DATASETS.get(dataset, dataset),
                dataset_name=dataset,
                dataset_split=split,
                metric_type="accuracy",
                # the Hub keeps one result of a task and dataset for each name: protocol and layer belong into it
                metric_name=metric,
                metric_value=round(100 * value, 2),
            )
        )
    data = ModelCardData(
        license=entry["license"],
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised", "rotation-prediction"],
        datasets=[hub for dataset, hub in HUB_DATASETS.items() if entry["data"].startswith(dataset)] or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _training(entry: dict[str, Any], files: dict[str, bytes]) -> list[str]:
    lines = [f"Recipe: {entry['recipe']}."]
    if "rotated_images" in entry:
        lines = [
            f"Recipe `{entry['recipe']}` of https://github.com/{REPOSITORY}, seed {entry['seed']}, commit"
            f" `{entry['commit']}`: {entry['rotated_images']:,} rotated images. `training.json` has the recipe and the"
            " loss of every step."
        ]
    return [*lines, "", "![Training loss](curve.png)"] if "curve.png" in files else lines


def _evaluation(name: str, rows: Sequence[Row]) -> list[str]:
    if not select(rows, name):
        return ["Not measured by this project."]
    return evaluation_lines(name, rows)


def _revision(api: HfApi, repository: str, name: str) -> str | None:
    """The revision of a branch or tag, None when there is none."""
    try:
        return api.model_info(repository, revision=name).sha
    except RevisionNotFoundError:
        return None


def _keep_golden(repository: str, revision: str, files: dict[str, bytes]) -> None:
    """Take over the golden outputs of a revision that agree with ours: another machine's differ by rounding."""
    served = _served(repository, revision, GOLDEN)
    if served is None:
        return
    ours, theirs = load(files[GOLDEN]), load(served)
    if ours.keys() == theirs.keys() and all(
        ours[key].shape == theirs[key].shape and (ours[key] - theirs[key]).abs().max() < GOLDEN_TOLERANCE
        for key in ours
    ):
        files[GOLDEN] = served


def _differing(repository: str, revision: str, files: dict[str, bytes]) -> list[str]:
    """The files whose content at a revision of the Hub is another."""
    return [path for path, content in files.items() if _served(repository, revision, path) != content]


def _served(repository: str, revision: str, path: str) -> bytes | None:
    """A file's content as the Hub serves it now, None where it has no such file."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return Path(hf_hub_download(repository, path, revision=revision, cache_dir=folder)).read_bytes()
        except EntryNotFoundError:
            return None


def _reason(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    told = {
        401: "the Hub wants a login: `hf auth login`, or HF_TOKEN",
        403: "no permission to write there",
        412: "someone else committed meanwhile",
    }
    if isinstance(error, RepositoryNotFoundError) and status != 404:
        return told[401]
    return told.get(status or 0) or first_line(error)


def _model_of_folder(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no config.json and {WEIGHTS}: rotation-ssl convert writes such folders")
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} cannot be loaded ({error}): convert it anew") from error
