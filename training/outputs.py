"""What a finished run leaves: weights, run.json and the curve as a figure."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from training.checkpoint import Progress
from training.recipes import Recipe
from training.results import device_name, library_versions


def describe_run(recipe: Recipe, progress: Progress, accelerator: Accelerator) -> dict[str, Any]:
    """What made the weights, as plain values for run.json."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "optimizer": type(recipe.optimizer).__name__,
        "schedule": type(recipe.schedule).__name__,
        "rotated_images": recipe.rotated_images,
        "seconds": progress.seconds,
        "commit": progress.commit,
        "versions": library_versions(),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "curve": progress.curve,
    }


def write_run(output: Path, run: dict[str, Any], model: nn.Module) -> None:
    """Write run.json, curve.png and, last, weights.safetensors (fp32): where it is, the run is finished."""
    (output / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    draw_curve(run, output / "curve.png")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    unfinished = output / "weights.tmp"
    save_file(state, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)
    unfinished.replace(output / "weights.safetensors")


def draw_curve(run: dict[str, Any], file: Path) -> None:
    """The loss over rotated images seen, as a png."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    per_step = run["rotated_images"] / run["curve"][-1]["step"]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([point["step"] * per_step for point in run["curve"]], [point["loss"] for point in run["curve"]], lw=1)
    axes.set(xlabel="rotated images seen", ylabel="rotation loss (cross-entropy)", title=run["recipe"]["name"])
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)
