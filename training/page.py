"""Build the page that predicts the orientation of photographs in the browser.

    python -m training page --output build/page

The folder is self-contained: the page from docs/try, the network as an ONNX file, sample photographs, and
onnxruntime-web, which npm downloads in the version pinned by docs/try/package-lock.json. Any web server can serve the
folder, and it can be uploaded as a static Space to the Hugging Face Hub. An existing page in the folder is overwritten.
Building requires npm.
"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn
from tqdm import tqdm

from rotation_ssl.demo import SAMPLES_DIR
from rotation_ssl.features import attention_map, layer_modules
from rotation_ssl.images import normalize
from rotation_ssl.models import ORIENTATION_MODEL, load_model
from rotation_ssl.orientation import calibration
from rotation_ssl.orientation.exif import write_orientation
from rotation_ssl.rotations import rotate_all
from training.command import create_parser, run
from training.export import onnx_file

SOURCE = Path(__file__).parent.parent / "docs" / "try"
PAGE_FILES = ("index.html", "style.css", "try.js", "icon.svg", "README.md")
# of the package's files the smallest set that runs ONNX files with WebAssembly
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
LAYER, POWER = "conv3", 4.0  # the middle one of five layers, and the paper's power for the third
# the EXIF orientation that each sample is shown with: some are turned
SAMPLES = {"china.jpg": 6, "astronaut.jpg": 3, "rocket.jpg": 8, "coffee.jpg": 1, "chelsea.jpg": 1}
MODEL_FILE, FACTS_FILE = "model.onnx", "model.json"


class PageNetwork(nn.Module):
    """Squares as the page cuts them, (V, 3, H, H) uint8 -> logits (4 V, 4) and attention maps (V, H, H).

    The logits are those of :func:`rotation_ssl.rotations.rotate_all`'s batch, the maps those of the squares as they
    are.

    Args:
        model: a timm model with four outputs that has ``forward_intermediates``.
        layer: a name of :func:`rotation_ssl.features.layer_modules`.
        power: of the attention maps.
    """

    def __init__(self, model: Any, layer: str, power: float) -> None:
        super().__init__()
        self.model = model
        self.index = list(layer_modules(model)).index(layer)
        self.power = power
        cfg = resolve_model_data_config(model)
        self.mean, self.std = cfg["mean"], cfg["std"]

    def forward(self, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and attention maps."""
        images = normalize(squares, self.mean, self.std)
        final, (maps,) = self.model.forward_intermediates(rotate_all(images), indices=[self.index])
        size = (squares.shape[-2], squares.shape[-1])
        return self.model.forward_head(final), attention_map(maps[: squares.shape[0]], self.power, size)


def install_runtime(folder: Path) -> None:
    """Have npm download onnxruntime-web, as the lock file pins it, and copy its files into a folder."""
    if (npm := shutil.which("npm")) is None:
        raise ValueError("the page needs npm to download onnxruntime-web: install Node.js, https://nodejs.org")
    with tempfile.TemporaryDirectory() as work:
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(SOURCE / name, Path(work, name))
        # no package's own code runs
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["it does not say why"]
            raise ValueError(f"npm could not install onnxruntime-web ({lines[0]}): check the network and run it again")
        for name in RUNTIME_FILES:
            shutil.copyfile(Path(work, "node_modules", "onnxruntime-web", "dist", name), folder / name)


def copy_page(folder: Path) -> None:
    """Copy the page's own files and the samples, of which some get an orientation that turns them."""
    for name in PAGE_FILES:
        shutil.copyfile(SOURCE / name, folder / name)
    (folder / "samples").mkdir()
    for name, orientation in SAMPLES.items():
        content = (SAMPLES_DIR / "photos" / name).read_bytes()
        (folder / "samples" / name).write_bytes(write_orientation(content, orientation))


def build_page(output: Path) -> int:
    """Build the page; returns its size in bytes."""
    is_page = all((output / name).is_file() for name in (*PAGE_FILES, *RUNTIME_FILES, MODEL_FILE))
    own = {*PAGE_FILES, *RUNTIME_FILES, MODEL_FILE, FACTS_FILE, "samples"} if is_page else set()
    if output.exists() and not (output.is_dir() and {file.name for file in output.iterdir()} <= own):
        raise ValueError(f"{output} exists and is not a page alone: give an empty --output")
    model: Any = load_model(ORIENTATION_MODEL, "cpu")
    size, temperature, threshold = calibration(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    unfinished.mkdir()
    try:
        with tqdm(total=3, unit="step", desc="downloading onnxruntime-web") as steps:
            install_runtime(unfinished)
            steps.update()
            steps.set_description("exporting the network")
            squares = torch.zeros(2, 3, size, size, dtype=torch.uint8)
            network = PageNetwork(model, LAYER, POWER).eval()
            content = onnx_file(network, squares, "squares", ["logits", "attention"])
            (unfinished / MODEL_FILE).write_bytes(content)
            steps.update()
            steps.set_description("copying the page")
            copy_page(unfinished)
            steps.update()
        facts = {"name": ORIENTATION_MODEL, "size": size, "temperature": temperature, "threshold": threshold}
        sizes = {name: (unfinished / name).stat().st_size for name in (MODEL_FILE, RUNTIME_FILES[1])}
        (unfinished / FACTS_FILE).write_text(json.dumps({**facts, "layer": LAYER, "bytes": sizes}, indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
        unfinished.replace(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return sum(file.stat().st_size for file in output.rglob("*") if file.is_file())


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = create_parser("page", __doc__)
    parser.add_argument("--output", type=Path, default=Path("build/page"), metavar="DIR", help="folder [%(default)s]")
    args = parser.parse_args(arguments)

    def work() -> None:
        size = build_page(args.output)
        print(f"{args.output}: {size / 1e6:.1f} MB; serve it: python -m http.server --directory {args.output}")

    return run(work, "stopped; nothing was written")
