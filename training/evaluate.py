"""Measure weights on CIFAR-10: rotation accuracy, and k-NN and linear accuracy of each layer's frozen features.

    python -m training.evaluate rotnet_nin.cifar10 --data-dir DIR
    python -m training.evaluate rotnet_nin --random --data-dir DIR

Every number becomes a row of training/results/<weights>.jsonl (--results FILE: elsewhere); `python -m training.publish
render` puts the rows into MODEL_CARD.md and README.md. Features are those of the images as they are (no crop, no flip)
by the frozen backbone in eval mode. The linear probe's strength is chosen on the last 5,000 training images; nothing is
chosen by test images.
"""

import argparse
import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import nn
from tqdm import tqdm

from rotation_ssl import zoo
from rotation_ssl.features import extract_features, layer_modules
from rotation_ssl.probes import LINEAR_STRENGTHS, knn_predict, linear_predict
from rotation_ssl.rotations import count_correct_rotations
from training.allocator import keep_large_blocks
from training.data import LabelledImages, load_cifar10, normalize
from training.results import RESULTS_DIR, Row, check_device, current_commit, device_name, library_versions, write_rows

PROTOCOLS = ("rotation", "knn", "linear")
VALIDATION = 5000
GRID = 4
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured: a backbone in eval mode, its name in the rows, and the sha256 of its weights."""

    name: str
    backbone: nn.Module
    sha256: str
    seed: int | None


def load_subject(name: str, random: bool, seed: int = 0) -> Subject:
    """A published ``model.tag`` (its default tag when it names none), or the model with random weights of ``seed``.

    Raises:
        ValueError: no such model or weights.
    """
    architecture = name.split(".", 1)[0]
    if architecture not in timm.list_models("rotnet_*"):
        raise ValueError(f"no model {architecture!r}; there are {', '.join(timm.list_models('rotnet_*'))}")
    if random:
        torch.manual_seed(seed)
        backbone = timm.create_model(architecture).eval()
        return Subject(
            f"{architecture}.random", backbone, hashlib.sha256(save(backbone.state_dict())).hexdigest(), seed
        )
    backbone = timm.create_model(name, pretrained=True).eval()
    name = f"{architecture}.{backbone.pretrained_cfg['tag']}"
    return Subject(name, backbone, zoo.manifest()[name]["sha256"], None)


def normalized_batches(images: torch.Tensor, backbone: nn.Module, device: str, what: str) -> Iterator[torch.Tensor]:
    """uint8 images (N, 3, H, W) in batches on the device, normalised for the backbone, with a progress bar."""
    cfg = resolve_model_data_config(backbone)
    with tqdm(total=len(images), desc=what, unit="img", mininterval=0.5) as bar:
        for part in images.split(BATCH):
            batch = normalize(part.to(device), cfg["mean"], cfg["std"])
            yield batch.contiguous(memory_format=torch.channels_last)
            bar.update(len(part))


def measure_rotation(subject: Subject, test: LabelledImages, device: str) -> list[Row]:
    """Rotation accuracy on all four rotations of every test image."""
    started = time.monotonic()
    batches = normalized_batches(test.images, subject.backbone, device, "rotation accuracy")
    correct, total = count_correct_rotations(subject.backbone, batches)
    return [
        _row(subject, "rotation accuracy", "", correct, total, f"{total // len(test)} rotations of each image", started)
    ]


def measure_probes(
    subject: Subject, train: LabelledImages, test: LabelledImages, protocols: tuple[str, ...], device: str
) -> list[Row]:
    """k-NN and linear accuracy of every layer, from one pass over the training and one over the test images."""
    backbone, layers = subject.backbone, list(layer_modules(subject.backbone))
    classes = len(train.classes)
    features = {
        split: extract_features(
            backbone, normalized_batches(data.images, backbone, device, f"features, {split}"), layers, grid=GRID
        )
        for split, data in (("train", train), ("test", test))
    }
    rows = []
    for layer in layers:
        train_features, test_features = features["train"].pop(layer), features["test"].pop(layer)
        if "knn" in protocols:
            started = time.monotonic()
            # cells of the grid are of equal size: their mean is the global average
            pooled = [f.unflatten(1, (-1, GRID**2)).mean(2) for f in (train_features, test_features)]
            predictions = knn_predict(pooled[0], train.labels, pooled[1], classes)
            settings = "k = 20, cosine, global average pooling"
            rows.append(_row(subject, "k-NN", layer, _correct(predictions, test), len(test), settings, started))
        if "linear" in protocols:
            started = time.monotonic()
            predictions, strength = linear_predict(
                train_features, train.labels, test_features, classes, validation=VALIDATION
            )
            candidates = ", ".join(f"{s:g}" for s in LINEAR_STRENGTHS)
            settings = f"logistic regression, {GRID} x {GRID} average pooling, L2 chosen of {candidates}"
            row = _row(subject, "linear probe", layer, _correct(predictions, test), len(test), settings, started)
            print(f"  L2 strength chosen for {layer}: {strength:g}")
            rows.append(row)
        for row in rows[-len(set(protocols) & {"knn", "linear"}) :]:
            print(f"  {row.weights} {row.layer} {row.protocol}: {100 * row.value:.2f} %")
    return rows


def _correct(predictions: torch.Tensor, test: LabelledImages) -> int:
    return int((predictions == test.labels).sum())


def _row(subject: Subject, protocol: str, layer: str, correct: int, n: int, settings: str, started: float) -> Row:
    device = next(subject.backbone.parameters()).device
    return Row(
        weights=subject.name,
        protocol=protocol,
        layer=layer,
        value=correct / n,
        source="measured",
        data="CIFAR-10 test",
        settings=settings,
        seed=subject.seed,
        correct=correct,
        n=n,
        sha256=subject.sha256,
        commit=current_commit(),
        versions=library_versions(),
        device=device_name(device),
        threads=torch.get_num_threads(),
        seconds=round(time.monotonic() - started, 1),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="model.tag, or a model for its default tag")
    parser.add_argument("--random", action="store_true", help="measure the network with random weights instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights [%(default)s]")
    parser.add_argument("--only", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="a part of the measurements")
    parser.add_argument("--data-dir", type=Path, default=Path("data/cifar10"), help="where CIFAR-10 is [%(default)s]")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR-10 into --data-dir")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps [%(default)s]")
    parser.add_argument("--results", type=Path, help="jsonl file for the rows [training/results/<weights>.jsonl]")
    args = parser.parse_args(arguments)
    keep_large_blocks()
    try:
        check_device(args.device)
        subject = load_subject(args.model, args.random, args.seed)
        subject.backbone.to(args.device).to(memory_format=torch.channels_last)
        file = args.results or RESULTS_DIR / f"{subject.name}.jsonl"
        test = load_cifar10(args.data_dir, "test", args.download)
        if "rotation" in args.only:
            rows = measure_rotation(subject, test, args.device)
            write_rows(file, rows)
            print(f"  {subject.name} rotation accuracy: {100 * rows[0].value:.2f} % ({rows[0].correct} of {rows[0].n})")
        if {"knn", "linear"} & set(args.only):
            train = load_cifar10(args.data_dir, "train", args.download)
            write_rows(file, measure_probes(subject, train, test, tuple(args.only), args.device))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"rows are in {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
