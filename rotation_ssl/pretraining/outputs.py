"""What a finished run leaves: weights, run.json and the curve as a figure. One run at a time writes to a folder."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from safetensors.torch import save
from torch import nn

from rotation_ssl.convert import UNKNOWN_METADATA, write_config
from rotation_ssl.files import replace_bytes, sync
from rotation_ssl.machine import device_name, library_versions
from rotation_ssl.messages import first_line
from rotation_ssl.pretraining.recipe import Recipe, field_defaults
from rotation_ssl.pretraining.setup import trained_size
from rotation_ssl.pretraining.state import Progress, copied_state
from rotation_ssl.rotations import ROTATION_NAMES, ROTATIONS

# seconds: NFS remembers for up to 30, by default, that a name does not exist, of the folder and then of a file in it
APPEARS_WITHIN = 90


@contextlib.contextmanager
def lock_output(accelerator: Accelerator, output: Path) -> Iterator[None]:
    """Keep other trainings out of a folder, which is made if missing; called by every process.

    The first process locks ``output/.lock``, which is removed at the end. The lock ends with the process, so that one
    that was killed is in nobody's way.

    Raises:
        ValueError: another training has the folder, or another machine has another folder of that name.
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
        # every process writes a part of each checkpoint
        if not all(gather_object([accelerator.is_main_process or _appears(output / ".lock")])):
            raise ValueError(f"{output} is not the same folder on all machines: give an --output that they share")
        yield
    finally:
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):
                (output / ".lock").unlink()
            lock.release()
            if made:
                with contextlib.suppress(OSError):
                    output.rmdir()  # nothing was written


def _appears(file: Path) -> bool:
    """Whether a file of another machine is there, or comes within APPEARS_WITHIN seconds."""
    end = time.monotonic() + APPEARS_WITHIN
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True


class Metrics:
    """metrics.jsonl, a line a point of the curve and of what the monitor saw, as the run goes.

    A resumed run keeps the points up to its checkpoint and removes those of the steps that it trains again.
    """

    def __init__(self, output: Path, progress: Progress, accelerator: Accelerator) -> None:
        self.file = output / "metrics.jsonl" if accelerator.is_main_process else Path(os.devnull)
        lines = self._kept(progress.step) or progress.curve
        if accelerator.is_main_process:
            # at once: what the monitor saw stands nowhere else
            replace_bytes(self.file, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def __enter__(self) -> "Metrics":
        self.stream = self.file.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def write(self, line: dict[str, Any]) -> None:
        """Add a line, which names its step."""
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()

    def _kept(self, step: int) -> list[dict[str, Any]]:
        """The lines of an earlier part of the run; a kill may have cut the last one short."""
        kept: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, ValueError):
            for text in self.file.read_text().splitlines() if step else ():
                line = json.loads(text)
                if line["step"] <= step:
                    kept.append(line)
        return kept


def check_finished(recipe: Recipe, images: str, output: Path) -> None:
    """Refuse to take a finished run of other settings, or of images of another fingerprint, for the one asked for."""
    try:
        run = json.loads((output / "run.json").read_text())
        finished = recorded_recipe(run["recipe"])
        trained_on = run["images"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output} holds weights of an unknown run ({error}): give another --output") from error
    asked = json.loads(json.dumps(dataclasses.asdict(recipe)))
    # nothing is computed any more: 'auto' was what it was
    if recipe.precision == "auto" and finished.get("precision") in ("bf16", "fp32"):
        del asked["precision"]
    different = [name for name in asked if name != "note" and finished.get(name) != asked[name]]
    if different:
        raise ValueError(
            f"{output} holds a finished run of another recipe ({', '.join(different)} differ): give another --output"
        )
    if trained_on != images:
        raise ValueError(
            f"{output} holds a finished run of other images ({trained_on} -> {images}): give another --output"
        )


def recorded_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as run.json has it; fields that are younger than the run have their defaults."""
    # a default is a tuple, what was read a list
    recorded: dict[str, Any] = json.loads(json.dumps({**field_defaults(), **recipe}))
    return recorded


def describe_run(recipe: Recipe, progress: Progress, accelerator: Accelerator) -> dict[str, Any]:
    """What made the weights, as plain values for run.json."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "optimizer": type(recipe.optimizer).__name__,
        "schedule": type(recipe.schedule).__name__,
        "rotated_images": recipe.rotated_images,
        **({"begun_with": progress.begun_with} if progress.begun_with else {}),
        "images": progress.identity["images"],
        "seconds": progress.seconds,
        "commit": progress.commit,
        "versions": library_versions(),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "curve": progress.curve,
    }


def write_run(output: Path, recipe: Recipe, run: dict[str, Any], model: nn.Module) -> None:
    """Write run.json, curve.png, config.json and, last, model.safetensors (fp32): where it is, the run is finished.

    The folder is one that ``timm.create_model('local-dir:FOLDER', pretrained=True)`` takes.
    """
    (output / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    draw_curve(run, output / "curve.png")
    content = save(copied_state(model), metadata={"format": "pt"})
    size = trained_size(recipe)
    cfg = {
        **UNKNOWN_METADATA,
        "tag": recipe.name,
        "input_size": (3, size, size),
        "crop_pct": 1.0,
        "test_input_size": None,
    }
    labels = ROTATION_NAMES if (recipe.rotations, recipe.rotation_unit) == (ROTATIONS, 90) else ()
    provenance = {"recipe": run["recipe"], "commit": run["commit"]}
    write_config(model, content, output / "config.json", cfg, provenance, labels)
    replace_bytes(output / "model.safetensors", content)
    sync(output)


def draw_curve(run: dict[str, Any], file: Path) -> None:
    """The loss over rotated images seen, as a png."""
    per_step = run["rotated_images"] / run["curve"][-1]["step"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([point["step"] * per_step for point in run["curve"]], [point["loss"] for point in run["curve"]], lw=1)
    axes.set(xlabel="rotated images seen", ylabel="rotation loss (cross-entropy)", title=run["recipe"]["name"])
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
