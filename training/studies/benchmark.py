"""Speed and memory, as ratios measured in one run.

    python -m training benchmark speed
    python -m training benchmark import
    python -m training benchmark load
    python -m training benchmark features --data PHOTOS

`speed` compares training with a naive pipeline that works like the authors' code (one image at a time through PIL and
numpy in loader processes, fp32, NCHW, torch's default allocator), and the FLOP/s of training and feature extraction
with this machine's bf16 matrix products; it also measures peak memory. It takes about 12 minutes on 2 cores, on which
nothing else should run.

`import` compares the time of `import timm, rotation_ssl` with that of `import timm`, each in new processes. `load`
compares `timm.create_model('rotnet_nin', pretrained=True)`, which verifies the weights, with timm loading the same file
into the same network. `features` compares `rotation-ssl features` on photographs with timm's loader and
forward_features, with as many data-loading workers, and with decoding alone and the network alone.

--record keeps the figures of `speed` for docs/reproduce.md, and those of `features` for docs/scale.md and README.md.

The two sides alternate, so that other load on the machine affects both; medians are compared.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
from timm.models import build_model_with_cfg
from tqdm import tqdm

from rotation_ssl import zoo
from rotation_ssl.backbones.nin import RotNetNIN
from rotation_ssl.cli.options import positive
from training.command import create_parser, run
from training.reporting.pages import EMBEDDING_FILE, ROOT, SPEED_FILE, embedding_text, speed_tables
from training.reporting.rows import require_committed
from training.studies.embedding_speed import measure_embedding
from training.studies.speed import measure_speed

ROUNDS = {"import": 15, "load": 100, "speed": 3, "features": 3}


def compare(base: Callable[[], object], ours: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of two calls over so many rounds, after one to warm up."""
    seconds: dict[Callable[[], object], list[float]] = {base: [], ours: []}
    for i in tqdm(range(rounds + 1), desc="rounds", unit="round"):
        for call in (base, ours) if i % 2 else (ours, base):
            started = time.perf_counter()
            call()
            if i:
                seconds[call].append(time.perf_counter() - started)
    return statistics.median(seconds[base]), statistics.median(seconds[ours])


def load_by_timm() -> RotNetNIN:
    """The bundled weights as timm would load them: no hash, no look at keys, shapes or values but its own."""
    name = "rotnet_nin.cifar10"
    overlay = {"file": str(zoo.WEIGHTS_DIR / zoo.manifest()[name]["file"])}
    model: RotNetNIN = build_model_with_cfg(RotNetNIN, "rotnet_nin", True, pretrained_cfg_overlay=overlay)
    return model


def load_ours() -> RotNetNIN:
    """The bundled weights, verified."""
    model: RotNetNIN = timm.create_model("rotnet_nin.cifar10", pretrained=True)
    return model


def run_fresh(statement: str) -> None:
    """Run a statement in a fresh process."""
    subprocess.run([sys.executable, "-c", statement], check=True, cwd=ROOT)


CALLS: dict[str, tuple[tuple[Callable[[], object], str], tuple[Callable[[], object], str]]] = {
    "import": (
        (partial(run_fresh, "import timm"), "import timm"),
        (partial(run_fresh, "import timm, rotation_ssl"), "import timm and rotation_ssl"),
    ),
    "load": ((load_by_timm, "timm by itself"), (load_ours, "verified by rotation_ssl")),
}


def _work(args: argparse.Namespace) -> None:
    rounds = args.rounds or ROUNDS[args.what]
    if args.what in CALLS:
        (base, first), (ours, second) = CALLS[args.what]
        seconds, our_seconds = compare(base, ours, rounds)
        print(f"{first} {seconds:.4f} s, {second} {our_seconds:.4f} s: ratio {our_seconds / seconds:.3f}")
        return
    if args.record:
        require_committed("--record")
    if args.what == "features":
        measured, file = measure_embedding(args.data, args.images, args.workers, rounds), EMBEDDING_FILE
        print(embedding_text(measured))
    else:
        measured, file = measure_speed(rounds), SPEED_FILE
        print(speed_tables(measured))
    if args.record:
        file.write_text(json.dumps(measured, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = create_parser("benchmark", __doc__)
    parser.add_argument("what", choices=ROUNDS, help="what to measure")
    parser.add_argument("--rounds", type=positive, metavar="N", help="rounds [import 15, load 100, others 3]")
    parser.add_argument("--data", type=Path, help="folder of the photographs, for features")
    parser.add_argument("--images", type=positive, default=5000, metavar="N", help="photographs to use [%(default)s]")
    parser.add_argument("--workers", type=positive, default=2, help="data-loading workers, for features [%(default)s]")
    parser.add_argument("--record", action="store_true", help="keep the figures of speed or features")
    args = parser.parse_args(arguments)
    if args.what == "features" and args.data is None:
        parser.error("features needs --data, a folder of photographs")
    if args.record and args.what in CALLS:
        parser.error(f"--record is for speed and features: {args.what} only prints a ratio")
    return run(lambda: _work(args), "stopped; nothing is kept")
