"""Measure how accurately a rotation head predicts which way up photographs are, and for how many it is confident.

    python -m training orientation rotnet_alexnet.photos --photos DIR
    python -m training orientation rotnet_alexnet.photos --photos DIR --fit --size 160

DIR contains imagenette2-320, imagewoof2-320, caltech101, VOCdevkit and exif. Whole photographs are processed as in
`rotation-ssl orient`. --fit fits, on Imagewoof val and Caltech-101 test, the temperature that calibrates the
confidences and the lowest thresholds at which 99 % and 99.5 % of the decisions are correct, for squares of --size
pixels, and writes them into the manifest. It prints the accuracy on these two sets, to choose the size by. The results
are measured on Imagenette val and VOC2007 test, which were not used for fitting; and on the 18 files of
https://github.com/recurser/exif-orientation-examples, two photographs with printed labels and the orientation tags 0 to
8, which test whether the tag is read. Rotating a picture rotates the prediction with it, so measuring upright
photographs is enough.
"""

import argparse
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from timm.data import resolve_model_data_config

from rotation_ssl import zoo
from rotation_ssl.cli.options import positive
from rotation_ssl.evaluation.frozen import PARTS
from rotation_ssl.images import normalize
from rotation_ssl.orientation.predict import check_head, picture_squares, rotation_logits
from rotation_ssl.orientation.turning import open_picture
from rotation_ssl.progress import progress
from training.command import create_parser
from training.datasets import DATASETS, check_whole, list_files
from training.evaluation import options
from training.evaluation.subject import Subject, load_subject, measured_row
from training.protocols import COVERAGES, orientation_settings
from training.reporting.manifest import enter_manifest, read_manifest
from training.reporting.report import keep_rows, run_measuring
from training.reporting.rows import Row

FITTED_ON, MEASURED_ON = ("imagewoof", "caltech101"), ("imagenette", "voc2007", "exif")
TEMPERATURES = [1.02**step for step in range(-80, 81)]
# by threshold of the manifest: the fraction of correct decisions that it is fitted for, and its name in protocols
TARGETS = {"threshold": (0.99, "99"), "sure_threshold": (0.995, "99.5")}
UPRIGHT = 0
DECODERS = 4  # threads
RANKED = 100  # pictures: of fewer, the accuracy on the most confident ones is not reported


def picture_logits(subject: Subject, files: Sequence[Path], size: int) -> list[torch.Tensor]:
    """Logits of each picture, (V, 4, 4): V squares of ``size`` pixels, 4 rotated copies of each, 4 rotations."""
    check_head(subject.backbone)
    cfg = resolve_model_data_config(subject.backbone)
    device = next(subject.backbone.parameters()).device
    parts = [files[start : start + 32] for start in range(0, len(files), 32)]
    found: list[torch.Tensor] = []

    def squares_of(file: Path) -> torch.Tensor:
        return picture_squares(open_picture(file, size).image, size)

    with ThreadPoolExecutor(DECODERS) as pool, torch.inference_mode(), progress("pictures", len(files)) as bar:
        for part in parts:
            views = list(pool.map(squares_of, part))
            squares = normalize(torch.cat(views).to(device), cfg["mean"], cfg["std"])
            found += rotation_logits(subject.backbone, squares).cpu().split(list(map(len, views)))
            bar.update(len(part))
    return found


def probabilities(logits: Sequence[torch.Tensor], temperature: float) -> torch.Tensor:
    """Of the rotations of N pictures, (N, 4): the mean over the squares and turns of :func:`picture_logits`."""
    return torch.stack([torch.softmax(each / temperature, -1).mean((0, 1)) for each in logits])


def fit_temperature(logits: Sequence[torch.Tensor]) -> float:
    """The temperature of :data:`TEMPERATURES` with the highest mean log-likelihood of upright."""
    likelihood = [float(probabilities(logits, t)[:, UPRIGHT].clamp_min(1e-12).log().mean()) for t in TEMPERATURES]
    return TEMPERATURES[likelihood.index(max(likelihood))]


def fit_threshold(confidence: torch.Tensor, right: torch.Tensor, target: float) -> float:
    """The lowest threshold at which at least the fraction ``target`` of the decisions is correct.

    Args:
        confidence: (N,).
        right: (N,) bool.
        target: 0 to 1.
    """
    confidence, order = confidence.sort(descending=True)
    share = right[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    # answers of equal confidence are decided together
    last = torch.cat([confidence[1:] < confidence[:-1], torch.tensor([True])])
    good = ((share >= target) & last).nonzero()
    if not len(good):
        raise ValueError(f"no confidence at which {target:.1%} of the decisions are right")
    return math.floor(float(confidence[good[-1]]) * 1e6) / 1e6


def most_confident(confidence: torch.Tensor) -> dict[int, torch.Tensor]:
    """Which pictures are among the most confident 10, 20, ... 90 %: a mask (N,) for each share in percent."""
    rank = confidence.argsort(descending=True, stable=True).argsort()
    return {share: rank < math.ceil(len(rank) * share / 100) for share in COVERAGES}


def measure_orientation(subject: Subject, files: Sequence[Path], name: str, calibration: dict[str, float]) -> list[Row]:
    """The rows of one dataset: the fractions of pictures predicted correctly, decided, and decided wrongly, and the
    accuracy on the most confident ones.

    Args:
        subject: the backbone, with 4 outputs.
        files: of upright photographs.
        name: of the data in the rows.
        calibration: 'size', 'temperature' and the thresholds of :data:`TARGETS`, as the manifest has them.
    """
    started = time.monotonic()
    size, temperature = int(calibration["size"]), calibration["temperature"]
    confidence, rotation = probabilities(picture_logits(subject, files, size), temperature).max(1)
    right = rotation == UPRIGHT
    counted = {"orientation": right}
    for field, (_, percent) in TARGETS.items():
        decided = confidence >= calibration[field]
        counted[f"orientation-decided-{percent}"] = decided
        counted[f"orientation-wrong-{percent}"] = decided & ~right
    totals = dict.fromkeys(counted, len(files))
    for share, chosen in most_confident(confidence).items() if len(files) >= RANKED else ():
        counted[f"orientation-top-{share}"] = chosen & right
        totals[f"orientation-top-{share}"] = int(chosen.sum())
    seconds = (time.monotonic() - started) / len(counted)
    return [
        measured_row(
            subject, [int(part.sum()) for part in which.tensor_split(PARTS)], totals[protocol], name,
            orientation_settings(size, temperature), seconds,
            protocol=protocol, layer="",
        )
        for protocol, which in counted.items()
    ]  # fmt: skip


def photo_list(dataset: str, root: Path) -> list[Path]:
    """The held-out photographs of a dataset, all of them."""
    files, _, _ = list_files(dataset, root, "test")
    check_whole(dataset, 0, len(files))
    return files


def calibration_of(subject: Subject) -> dict[str, float]:
    """The image size, the temperature and the thresholds of published weights."""
    found = zoo.manifest().get(subject.name, {}).get("orientation")
    if not found:
        raise ValueError(f"no temperature is known for {subject.name}: give --fit first")
    return dict(found)


def fit_calibration(subject: Subject, root: Path, size: int) -> dict[str, float]:
    """Temperature and thresholds for an image size, fitted on :data:`FITTED_ON`, whose accuracies are printed."""
    parts = {DATASETS[name].name: picture_logits(subject, photo_list(name, root), size) for name in FITTED_ON}
    logits = [each for part in parts.values() for each in part]
    temperature = fit_temperature(logits)
    confidence, rotation = probabilities(logits, temperature).max(1)
    right = rotation == UPRIGHT
    for name, own in zip(parts, right.double().split(list(map(len, parts.values()))), strict=True):
        print(f"{name}, {size} pixels: {own.mean():.2%} correct")
    thresholds = {field: fit_threshold(confidence, right, target) for field, (target, _) in TARGETS.items()}
    return {"size": size, "temperature": round(temperature, 6), **thresholds}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = create_parser("orientation", __doc__)
    parser.add_argument("model", metavar="MODEL.TAG", help="name of bundled weights with four outputs")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="folder of the datasets")
    parser.add_argument("--fit", action="store_true", help="choose temperature and thresholds, write the manifest")
    parser.add_argument(
        "--size",
        type=positive,
        help="side of the squares in pixels, for --fit [as before, or the model's input size]",
    )
    options.add_output(parser, "runs/orientation")
    args = parser.parse_args(arguments)
    return run_measuring(lambda: _work(args), args.device)


def _work(args: argparse.Namespace) -> Path:
    if args.fit and args.record:
        raise ValueError("--record is for published thresholds: fit them, commit them, then measure with --record")
    subject = load_subject(args.model).on(args.device)
    file = options.rows_file(args, subject)
    if args.size and not args.fit:
        raise ValueError("--size is for --fit: a threshold is fitted for a size")
    if args.fit:
        known = zoo.manifest().get(subject.name, {}).get("orientation", {})
        calibration = fit_calibration(subject, args.photos, args.size or known.get("size", subject.size))
    else:
        calibration = calibration_of(subject)
    if args.fit and subject.published:
        enter_manifest(subject.name, {**read_manifest()[subject.name], "orientation": calibration})
    print(", ".join(f"{name} {value:g}" for name, value in calibration.items()))
    rows = (
        row
        for dataset in MEASURED_ON
        for row in measure_orientation(subject, photo_list(dataset, args.photos), DATASETS[dataset].name, calibration)
    )
    return keep_rows(rows, file)
