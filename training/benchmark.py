"""What things cost, as ratios measured in one run.

    python -m training.benchmark import

`import`: wall time of `import timm, rotation_ssl` against `import timm`, each in fresh processes taken in turns, so
that what else the machine does falls on both alike.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent


def import_seconds(statement: str) -> float:
    """Wall time of a fresh Python that runs one statement."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, cwd=ROOT)
    return time.perf_counter() - started


def compare_imports(rounds: int) -> tuple[float, float]:
    """Median seconds of `import timm` and of `import timm, rotation_ssl` over so many rounds, after one to warm up."""
    statements = ("import timm", "import timm, rotation_ssl")
    seconds: dict[str, list[float]] = {statement: [] for statement in statements}
    for i in tqdm(range(rounds + 1), desc="rounds", unit="round"):
        for statement in statements if i % 2 else reversed(statements):
            taken = import_seconds(statement)
            if i:
                seconds[statement].append(taken)
    return statistics.median(seconds[statements[0]]), statistics.median(seconds[statements[1]])


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("import",), help="what to measure")
    parser.add_argument("--rounds", type=int, default=15, help="fresh processes of each [%(default)s]")
    args = parser.parse_args(arguments)
    base, ours = compare_imports(args.rounds)
    print(f"import timm {base:.2f} s, import timm and rotation_ssl {ours:.2f} s: ratio {ours / base:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
