"""The precision of trainings and probes: fp32, or bf16 by autocast where the device supports it."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, TypeVar

import torch

AnyRecipe = TypeVar("AnyRecipe", bound=Any)  # a frozen dataclass with a precision


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """Resolve 'auto' to 'bf16' if the device supports it, else to 'fp32'; other precisions are returned unchanged."""
    if precision != "auto":
        return precision
    return "bf16" if supports_bfloat16(device) else "fp32"


def resolved(recipe: AnyRecipe, device: torch.device | str) -> AnyRecipe:
    """The recipe with its precision resolved for a device, never 'auto'."""
    return dataclasses.replace(recipe, precision=resolve_precision(recipe.precision, device))


def supports_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether a device has instructions for bfloat16: a CUDA GPU, or a processor that says so in /proc/cpuinfo.

    On other devices bfloat16 is emulated, or its support is unknown.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The processor's instruction sets as Linux names them; none where there is no /proc/cpuinfo."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}


def autocast_type(precision: str) -> torch.dtype | None:
    """The type to autocast to in a resolved precision; None for fp32."""
    return torch.bfloat16 if precision == "bf16" else None


def warn_if_emulated(precision: str | None, device: torch.device | str) -> None:
    """Print a one-line warning if bf16 is asked for and the device is not known to support it."""
    if precision == "bf16" and not supports_bfloat16(device):
        told = f"{device} has no known bfloat16 instructions: bf16 may be many times slower than fp32"
        print(told, file=sys.stderr)  # noqa: T201
