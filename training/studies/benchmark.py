"""Speed and memory, as ratios measured in one run.

    python -m training benchmark speed
    python -m training benchmark import
    python -m training benchmark load

`speed` compares training with a naive pipeline that works like the authors' code (one image at a time through PIL and
numpy in loader processes, fp32, NCHW, torch's default allocator), and the FLOP/s of training and feature extraction
with this machine's bf16 matrix products; it also measures peak memory, and how each grows with image size and batch. It
takes about 12 minutes on 2 cores, on which nothing else should run. --record writes the figures of docs/reproduce.md.

`import` compares the time of `import timm, rotation_ssl` with that of `import timm`, each in new processes. `load`
compares `timm.create_model('rotnet_nin', pretrained=True)`, which verifies the weights, with timm loading the same file
into the same network.

The two sides alternate, so that other load on the machine affects both; medians are compared.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
from timm.models import build_model_with_cfg
from tqdm import tqdm

from rotation_ssl import zoo
from rotation_ssl.backbones.nin import RotNetNIN
from training.reporting.pages import SPEED_FILE, speed_tables
from training.reporting.rows import require_committed
from training.studies.speed import measure_speed

ROOT = Path(__file__).parent.parent.parent
ROUNDS = {"import": 15, "load": 100, "speed": 3}


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


def import_timm() -> None:
    """`import timm` in a fresh process."""
    _run("import timm")


def import_ours() -> None:
    """`import timm, rotation_ssl` in a fresh process."""
    _run("import timm, rotation_ssl")


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


def _run(statement: str) -> None:
    subprocess.run([sys.executable, "-c", statement], check=True, cwd=ROOT)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=ROUNDS, help="what to measure")
    parser.add_argument("--rounds", type=int, help="of each [import 15, load 100, speed 3]")
    parser.add_argument("--record", action="store_true", help="of speed: keep the figures for README.md")
    args = parser.parse_args(arguments)
    if args.what == "speed":
        try:
            if args.record:
                require_committed("--record")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        measured = measure_speed(args.rounds or ROUNDS["speed"])
        print(speed_tables(measured))
        if args.record:
            SPEED_FILE.write_text(json.dumps(measured, indent=1) + "\n")
        return 0
    calls = {"import": (import_timm, import_ours), "load": (load_by_timm, load_ours)}
    titles = {
        "import": ("import timm", "import timm and rotation_ssl"),
        "load": ("timm by itself", "verified by rotation_ssl"),
    }
    base, ours = compare(*calls[args.what], args.rounds or ROUNDS[args.what])
    first, second = titles[args.what]
    print(f"{first} {base:.4f} s, {second} {ours:.4f} s: ratio {ours / base:.3f}")
    return 0
