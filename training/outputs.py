"""What a finished run leaves: weights, run.json and the curve as a figure. One run at a time writes to a folder."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import nn

from rotation_ssl.convert import NOT_OF_THESE_WEIGHTS, write_config
from rotation_ssl.messages import first_line
from training.checkpoint import Progress, sync
from training.recipes import Recipe
from training.reporting.rows import device_name, library_versions


@contextlib.contextmanager
def lock_output(accelerator: Accelerator, output: Path) -> Iterator[None]:
    """Keep other trainings out of a folder, which is made if missing; called by every process.

    The first process locks ``output/.lock``, which is removed at the end. The lock ends with the process, so that one
    that was killed is in nobody's way.

    Raises:
        ValueError: another training has the folder.
        OSError: the folder cannot be written.
    """
    made, lock = not output.exists(), FileLock(output / ".lock", timeout=0)
    refusal: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            output.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            refusal = [ValueError(f"another training is writing to {output}: wait for it, or give another --output")]
        except OSError as error:
            refusal = [OSError(f"output folder {output} cannot be written ({first_line(error)})")]
    broadcast_object_list(refusal)
    if refusal[0]:
        raise refusal[0]
    try:
        yield
    finally:
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):
                (output / ".lock").unlink()
            lock.release()
            if made:
                with contextlib.suppress(OSError):
                    output.rmdir()  # nothing was written


def describe_run(recipe: Recipe, progress: Progress, accelerator: Accelerator) -> dict[str, Any]:
    """What made the weights, as plain values for run.json."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "optimizer": type(recipe.optimizer).__name__,
        "schedule": type(recipe.schedule).__name__,
        "rotated_images": recipe.rotated_images,
        "images": progress.identity["images"],
        "seconds": progress.seconds,
        "commit": progress.commit,
        "versions": library_versions(),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "curve": progress.curve,
    }


def trained_size(recipe: Recipe, model: nn.Module) -> int:
    """Side of the whole images that a trained network takes: of one that takes a single size, the crops'."""
    fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size")
    return recipe.stages[-1].crop if fixed else recipe.input_size


def write_run(output: Path, recipe: Recipe, run: dict[str, Any], model: nn.Module) -> None:
    """Write run.json, curve.png, config.json and, last, model.safetensors (fp32): where it is, the run is finished.

    The folder is one that ``timm.create_model('local-dir:FOLDER', pretrained=True)`` takes.
    """
    (output / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    draw_curve(run, output / "curve.png")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = save(state, metadata={"format": "pt"})
    unfinished = output / "model.tmp"
    unfinished.write_bytes(content)
    size = trained_size(recipe, model)
    cfg = {
        **NOT_OF_THESE_WEIGHTS,
        "tag": recipe.name,
        "input_size": (3, size, size),
        "crop_pct": 1.0,
        "test_input_size": None,
    }
    write_config(model, content, output / "config.json", cfg, {"recipe": run["recipe"], "commit": run["commit"]})
    sync(unfinished)
    unfinished.replace(output / "model.safetensors")
    sync(output)


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
