"""Pretrain a backbone by predicting rotations: a recipe in, weights and their curve out.

    python -m training.pretrain nin-cifar10-cpu --data-dir DIR --output runs/nin

DIR holds CIFAR-10 as train/<class>/*.png, or --download fetches it there. The output folder gets a checkpoint every few
minutes, and at the end weights.safetensors, run.json (recipe, curve, commit, versions) and curve.png. Ctrl-C saves a
checkpoint and stops; --resume goes on from the last one, to the same weights as without the stop.
"""

import argparse
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from torch import nn
from torch.optim import swa_utils
from tqdm import tqdm

import rotation_ssl  # noqa: F401  registers the models with timm
from rotation_ssl.images import normalize
from rotation_ssl.rotations import count_correct_rotations, rotation_loss
from training.allocator import keep_large_blocks
from training.data import LabelledImages, crop_and_flip, load_cifar10
from training.eighths import count_correct_eighths, eighths_loss
from training.optimizers import create_optimizers, learning_rate_factor, renormalize_filters, set_learning_rates
from training.recipes import RECIPES, Muon, Recipe, shortened
from training.results import check_device, current_commit, device_name, library_versions

CURVE_EVERY = 10  # steps averaged into one point of the curve
STATISTICS_STEPS = 50  # whose images give averaged weights their batch norm's statistics


def pretrain(
    recipe: Recipe,
    images: torch.Tensor,
    output: Path,
    device: torch.device | str = "cpu",
    resume: bool = False,
    checkpoint_seconds: float = 180.0,
) -> Path:
    """Train ``recipe`` on ``images`` (N, 3, H, H) uint8 and write the weights.

    Args:
        recipe: all of the training's settings.
        images: the training images, upright; their labels are not needed.
        output: folder for checkpoint, weights, run.json and curve.png; made if missing.
        device: where to train; the images are moved there.
        resume: go on from ``output``'s checkpoint.
        checkpoint_seconds: time between checkpoints; a kill loses that much and the steps to the curve's next point.

    Returns:
        The weights file, or the checkpoint when the run was stopped by Ctrl-C or SIGTERM.

    Raises:
        ValueError: too few images, nothing to resume, a checkpoint of another recipe, or a finished run in the way.
    """
    weights_file, checkpoint_file = output / "weights.safetensors", output / "checkpoint.pt"
    if not 0 <= recipe.holdout < len(images):
        raise ValueError(f"holdout must be 0 to {len(images) - 1} of the training images, got {recipe.holdout}")
    commit = current_commit()
    train_images = images[: len(images) - recipe.holdout].to(device)
    if len(train_images) < recipe.images_per_step:
        raise ValueError(f"{recipe.name} takes {recipe.images_per_step} images a step, there are {len(train_images)}")
    if weights_file.exists() or (checkpoint_file.exists() and not resume):
        raise ValueError(f"{output} holds a run already: --resume an unfinished one, or give another --output")
    if resume and not checkpoint_file.exists():
        raise ValueError(f"nothing to resume: {checkpoint_file} does not exist; start without --resume")

    torch.manual_seed(recipe.seed)
    model = timm.create_model(recipe.model, num_classes=len(recipe.rotations))
    model.to(device, memory_format=torch.channels_last).train()
    optimizers = create_optimizers(recipe.optimizer, model)
    average = None
    if recipe.average:
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(recipe.average))
    identity = {**_fields(recipe), "number of images": repr(len(train_images))}
    step, seconds = 0, 0.0
    curve: list[dict[str, Any]] = []
    if resume:
        step, curve, commit = load_checkpoint(checkpoint_file, identity, model, optimizers, average)
        seconds = curve[-1]["seconds"] if curve else 0.0
    output.mkdir(parents=True, exist_ok=True)

    with StopRequest() as stop, progress_bar(recipe, step) as bar:
        started = saved = time.monotonic()
        losses: list[torch.Tensor] = []
        while step < recipe.steps and not stop.requested:
            set_learning_rates(optimizers, learning_rate_factor(recipe.schedule, step, recipe.steps))
            batch = augmented_batch(recipe, model, train_images, step)
            if isinstance(recipe.optimizer, Muon):
                renormalize_filters(model)
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = pretext_loss(recipe, model, batch)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if average is not None:
                average.update_parameters(model)
            losses.append(loss.detach())
            step += 1
            bar.update(len(batch) * len(recipe.rotations))
            if step % CURVE_EVERY == 0 or step == recipe.steps:
                mean_loss = torch.stack(losses).mean().item()
                if not np.isfinite(mean_loss):
                    raise ValueError(
                        f"the loss became {mean_loss} by step {step}; lower the learning rate of {recipe.name}"
                    )
                now = seconds + time.monotonic() - started
                curve.append({"step": step, "loss": mean_loss, "seconds": round(now, 1)})
                bar.set_postfix(loss=f"{mean_loss:.3f}", crop=recipe.crop_at(step - 1))
                losses.clear()
            if time.monotonic() - saved > checkpoint_seconds and not losses:
                save_checkpoint(checkpoint_file, identity, model, optimizers, average, step, curve, commit)
                saved = time.monotonic()
    if step < recipe.steps:
        save_checkpoint(checkpoint_file, identity, model, optimizers, average, step, curve, commit)
        return checkpoint_file

    if average is not None:
        model.load_state_dict(average.module.state_dict())
        renew_statistics(recipe, model, train_images)
    run = describe_run(recipe, curve, device, commit)
    if recipe.holdout:
        correct, total = holdout_accuracy(recipe, model, images[-recipe.holdout :].to(device))
        run["holdout_rotation_accuracy"] = {"correct": correct, "n": total}
    write_run(output, run, model)
    checkpoint_file.unlink(missing_ok=True)
    return weights_file


def augmented_batch(recipe: Recipe, model: nn.Module, images: torch.Tensor, step: int) -> torch.Tensor:
    """The normalised upright crops of step ``step``: a function of recipe and step alone, so that resuming is exact."""
    steps_per_epoch = len(images) // recipe.images_per_step
    epoch, position = divmod(step, steps_per_epoch)
    order = torch.randperm(len(images), generator=_generator(recipe.seed, 0, epoch))
    chosen = order[position * recipe.images_per_step : (position + 1) * recipe.images_per_step].to(images.device)
    mirrored: bool | torch.Tensor = recipe.flip == "random"
    if recipe.flip == "alternate":
        first = torch.rand(len(images), generator=_generator(recipe.seed, 2, 0)) < 0.5
        mirrored = (first ^ bool(epoch % 2))[chosen.cpu()]
    crops = crop_and_flip(
        images[chosen],
        recipe.crop_at(step),
        recipe.padding,
        recipe.padding_mode,
        mirrored,
        _generator(recipe.seed, 1, step),
    )
    cfg = resolve_model_data_config(model)
    return normalize(crops, cfg["mean"], cfg["std"])


def pretext_loss(recipe: Recipe, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The recipe's pretext task on a batch of upright images: rotations by quarters or by eighths of a turn."""
    if recipe.rotation_unit == 45:
        return eighths_loss(model, batch, recipe.label_smoothing)
    return rotation_loss(model, batch, recipe.rotations, recipe.label_smoothing)


@torch.no_grad()
def renew_statistics(recipe: Recipe, model: nn.Module, images: torch.Tensor) -> None:
    """Take batch norm's statistics anew, of averaged weights, on augmented images of the last stage."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    for step in range(max(0, recipe.steps - STATISTICS_STEPS), recipe.steps):
        batch = augmented_batch(recipe, model, images, step)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            pretext_loss(recipe, model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def holdout_accuracy(recipe: Recipe, model: nn.Module, images: torch.Tensor) -> tuple[int, int]:
    """Right guesses and their number on held-out training images, uncropped."""
    cfg = resolve_model_data_config(model)
    batches = (normalize(part, cfg["mean"], cfg["std"]) for part in images.split(128))
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        if recipe.rotation_unit == 45:
            return count_correct_eighths(model, batches)
        return count_correct_rotations(model, batches, recipe.rotations)


def save_checkpoint(
    file: Path,
    identity: dict[str, str],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: nn.Module | None,
    step: int,
    curve: list[Any],
    commit: str,
) -> None:
    """Write all that resuming needs; a kill while writing leaves the previous checkpoint whole."""
    state = {
        "recipe": identity,
        "step": step,
        "curve": curve,
        "commit": commit,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "average": average.state_dict() if average is not None else {},
    }
    unfinished = file.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.replace(file)


def load_checkpoint(
    file: Path,
    identity: dict[str, str],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: nn.Module | None = None,
) -> tuple[int, list[dict[str, Any]], str]:
    """Restore model and optimizers; returns the step to go on from, the curve and the commit that began the run.

    Raises:
        ValueError: the file is not a checkpoint, or one of another recipe or other images.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        saved, progress = state["recipe"], (state["step"], state["curve"], state["commit"])
    except Exception as error:
        # torch's own text is a page long
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is not a checkpoint of this program ({reason}); remove it to start anew") from error
    different = [f"{name} {saved.get(name)} -> {ours}" for name, ours in identity.items() if saved.get(name) != ours]
    if different:
        raise ValueError(f"{file} is of another recipe ({'; '.join(different)}): resume with that one, or start anew")
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    if average is not None:
        average.load_state_dict(state["average"])
    return progress


def describe_run(
    recipe: Recipe, curve: list[dict[str, Any]], device: torch.device | str, commit: str
) -> dict[str, Any]:
    """What made the weights, as plain values for run.json."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "optimizer": type(recipe.optimizer).__name__,
        "schedule": type(recipe.schedule).__name__,
        "rotated_images": recipe.rotated_images,
        "seconds": curve[-1]["seconds"],
        "commit": commit,
        "versions": library_versions(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "curve": curve,
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


class StopRequest:
    """Ctrl-C and SIGTERM, heard at the end of a step: the state is never saved half-updated."""

    def __enter__(self) -> "StopRequest":
        self.requested = False
        self._previous = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hear(self, *_: object) -> None:
        self.requested = True


def progress_bar(recipe: Recipe, step: int) -> tqdm:
    """Rotated images done, their rate and the time left."""
    per_step = recipe.images_per_step * len(recipe.rotations)
    return tqdm(
        total=recipe.rotated_images,
        initial=step * per_step,
        unit="img",
        desc=recipe.name,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, stream, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _fields(recipe: Recipe) -> dict[str, str]:
    return {f.name: repr(getattr(recipe, f.name)) for f in dataclasses.fields(recipe) if f.name != "note"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    recipes = "\n".join(
        f"  {r.name:24s} {r.model}, {r.rotated_images:,} rotated images of {r.data}{'; ' + r.note if r.note else ''}"
        for r in RECIPES.values()
    )
    parser = argparse.ArgumentParser(
        prog="python -m training.pretrain",
        description=__doc__,
        epilog=f"recipes:\n{recipes}\n\nOn Linux glibc is told to keep large blocks, which is faster; "
        "ROTATION_SSL_MALLOPT=0 turns that off.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", choices=sorted(RECIPES), metavar="RECIPE", help="one of the recipes below")
    parser.add_argument("--data-dir", type=Path, default=Path("data/cifar10"), help="where CIFAR-10 is [%(default)s]")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR-10 into --data-dir")
    parser.add_argument("--output", type=Path, help="folder for checkpoint, weights and curve [runs/RECIPE]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps [%(default)s]")
    parser.add_argument("--resume", action="store_true", help="go on from the output folder's checkpoint")
    parser.add_argument("--checkpoint-seconds", type=float, default=180.0, help="between checkpoints [%(default)s]")
    parser.add_argument("--seed", type=int, help="instead of the recipe's")
    parser.add_argument("--steps", type=int, help="fewer than the recipe's, each stage in proportion: to try it out")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="instead of the recipe's")
    parser.add_argument("--holdout", type=int, help="training images kept out, to tune on, instead of the recipe's")
    args = parser.parse_args(arguments)
    overrides = {name: getattr(args, name) for name in ("seed", "precision", "holdout")}
    recipe = dataclasses.replace(RECIPES[args.recipe], **{k: v for k, v in overrides.items() if v is not None})
    output = args.output or Path("runs") / recipe.name
    keep_large_blocks()
    try:
        if args.steps is not None:
            recipe = shortened(recipe, args.steps)
        check_device(args.device)
        data: LabelledImages = load_cifar10(args.data_dir, "train", args.download)
        result = pretrain(recipe, data.images, output, args.device, args.resume, args.checkpoint_seconds)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result.suffix == ".pt":
        print(f"stopped; go on with --resume --output {output}", file=sys.stderr)
        return 130
    print(f"wrote {result}, run.json and curve.png beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
