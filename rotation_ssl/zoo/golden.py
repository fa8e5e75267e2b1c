"""What published weights give for a few sample images, stored with them: does this machine compute the same?"""

from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import nn

from rotation_ssl.features import extract_features
from rotation_ssl.images import normalize, read_images
from rotation_ssl.messages import first_line
from rotation_ssl.zoo import published

GOLDEN_TOLERANCE = 1e-3  # of logits and pooled features, both of the order of 1
SAMPLES_DIR = Path(__file__).parent.parent / "samples"


def golden_file(name: str) -> Path:
    """Where the golden outputs of ``model.tag`` are in the package."""
    return published.WEIGHTS_DIR / f"{name}.golden.safetensors"


def golden_outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """'input' (N, 3, H, H), every fifth sample image, 'logits' (N, K), and each layer's global average (N, C)."""
    files = sorted((SAMPLES_DIR / "cifar10").glob("*.png"))[::5]
    cfg = resolve_model_data_config(model)
    batch = normalize(read_images(files, cfg["input_size"][-1]), cfg["mean"], cfg["std"])
    return {"input": batch, **_outputs(model, batch)}


def golden_difference(name: str) -> float:
    """The largest difference between the outputs of published weights on this machine and the golden ones.

    nan if any output is not a number. Compare with :data:`GOLDEN_TOLERANCE`.

    Raises:
        ValueError: no such weights, or they cannot be loaded, or their golden outputs are missing or corrupt.
    """
    file = golden_file(name)
    if not file.is_file():
        raise ValueError(f"{name} has no golden outputs: {file} does not exist")
    model = timm.create_model(name, pretrained=True)
    try:
        golden = load_file(file)
        outputs = _outputs(model, golden["input"])
        # torch's maximum, unlike Python's, is nan where any of them is
        return float(torch.stack([(outputs[key] - golden[key]).abs().max() for key in outputs]).max())
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"the golden outputs of {name} are corrupt: {file} ({first_line(error)}); reinstall rotation-ssl"
        ) from error


def _outputs(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        logits = model.eval()(batch)
    return {"logits": logits, **extract_features(model, batch)}
