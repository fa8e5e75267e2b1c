"""The model card of a Hub repository, in the form of timm's own cards."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rotation_ssl
from rotation_ssl.backbones.about import network_facts
from training.reporting.applications import orientation_table
from training.reporting.manifest import seen_in_training
from training.reporting.pages import REPOSITORY
from training.reporting.required import main_data
from training.reporting.rows import Row
from training.reporting.tables import evaluation_lines, select
from training.reporting.transfers import is_transfer, transfer_lines

CARD_TEMPLATE = Path(__file__).parent / "card.md"
HUB_DATASETS = {"CIFAR-10": "cifar10"}


def card_text(
    name: str,
    entry: Mapping[str, Any],
    model: nn.Module,
    files: Mapping[str, bytes],
    repository: str,
    version: str,
    rows: Sequence[Row],
) -> str:
    """README.md of a repository: the Hub's metadata, then the card.

    Args:
        name: the published ``model.tag``.
        entry: its entry of the manifest.
        model: the network with the weights, in eval mode.
        files: the other files of the repository, by their paths.
        repository: ``namespace/name`` on the Hub.
        version: the tag of this upload.
        rows: all result rows.
    """
    architecture, tag = name.split(".", 1)
    params, macs, activations = model_stats(model, entry["input_size"])
    bare = network_facts(architecture).timm_name
    text = Template(CARD_TEMPLATE.read_text()).substitute(
        name=name,
        model=architecture,
        tag=tag,
        repository=repository,
        version=version,
        code=REPOSITORY,
        release=f"v{rotation_ssl.__version__}",
        first=f"These weights load with timm alone: the architecture is timm's `{bare}`."
        if bare
        else f"Run `import rotation_ssl` first: timm and transformers do not know the architecture `{architecture}` "
        f"without it. Install it from https://github.com/{REPOSITORY}.",
        imports="import timm" if bare else "import rotation_ssl  # registers the architecture\nimport timm",
        wrapper_import="" if bare else "import rotation_ssl\n",
        params=f"{params / 1e6:.1f}",
        macs=f"{macs / 1e9:.2f}",
        activations=f"{activations / 1e6:.1f}",
        size=" x ".join(map(str, entry["input_size"][1:])),
        sha256=entry["sha256"],
        bytes=f"{entry['size']:,}",
        dtype=entry.get("dtype", "fp32"),
        head=", including the rotation head; `backbone.safetensors` has the backbone only"
        if "backbone.safetensors" in files
        else "",
        data=entry["data"],
        origin=entry["origin"],
        layer=entry["recommended_layer"],
        maps=_feature_maps(architecture, entry),
        features=model.num_features,
        training="\n".join(_training(entry, files)),
        evaluation=_evaluation(name, rows),
    )
    return f"---\n{_card_data(name, entry)}\n---\n\n{text}"


def model_stats(model: nn.Module, input_size: Sequence[int]) -> tuple[int, int, int]:
    """Parameters, multiply-adds and activations of one image (channels, height, width), as timm's cards give them.

    Activations are the values that convolutions and fully connected layers put out.
    """
    counted: list[int] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: counted.append(output.numel()))
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *input_size))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2, sum(counted)


def _feature_maps(architecture: str, entry: Mapping[str, Any]) -> str:
    """The shapes of `features_only`, as comments of the card's snippet."""
    model = timm.create_model(architecture, features_only=True, **entry.get("model_args", {})).eval()
    with torch.no_grad():
        maps = model(torch.zeros(1, *entry["input_size"]))
    names = model.feature_info.module_name()
    return "\n".join(f"    # {name}: {tuple(found.shape)}" for name, found in zip(names, maps, strict=True))


def _card_data(name: str, entry: Mapping[str, Any]) -> str:
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
                source_name="Result rows of rotation_ssl",
                source_url=f"https://github.com/{REPOSITORY}/blob/v{rotation_ssl.__version__}/MODEL_CARD.md",
            )
        )
    data = ModelCardData(
        license=entry["license"],
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["timm", "transformers", "onnx", "self-supervised", "rotation-prediction"],
        datasets=[hub for dataset, hub in HUB_DATASETS.items() if re.match(rf"{dataset}\b", entry["data"])] or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _training(entry: Mapping[str, Any], files: Mapping[str, bytes]) -> list[str]:
    lines = [f"Recipe: {entry['recipe']}."]
    if "rotated_images" in entry:
        lines = [
            f"Recipe `{entry['recipe']}` of https://github.com/{REPOSITORY}, seed {entry['seed']}, commit"
            f" `{entry['commit']}`: {seen_in_training(entry)}. `training.json` has the recipe and the"
            " loss of every step."
        ]
    return [*lines, "", "![Training loss](curve.png)"] if "curve.png" in files else lines


def _evaluation(name: str, rows: Sequence[Row]) -> str:
    own = select(rows, name)
    if not own:
        return "Not measured by this project."
    parts = ["\n".join(evaluation_lines(name, rows)).strip()]
    if any(map(is_transfer, own)):
        parts.append(f"### PASCAL VOC2007\n\n{transfer_lines(rows)}")
    if any(row.protocol == "orientation" for row in own):
        parts.append(f"### Which way up a photograph is\n\n{orientation_table(own)}")
    return "\n\n".join(parts)
