"""isoscale doctor: what this machine can do, and who will run what."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import TYPE_CHECKING, Any

import typer

from isoscale.cli.common import AsJson, emit

if TYPE_CHECKING:
    import torch

EXTRAS = {"plotly": "report", "tokenizers": "text", "datasets": "hub texts"}


def _facts() -> dict[str, Any]:
    import torch

    from isoscale._base.cache import cache_folder
    from isoscale.numerics import pick_backend
    from isoscale.train import pick_device

    device = pick_device("auto")
    cache = cache_folder()
    home = cache
    while not home.exists():
        home = home.parent
    return {
        "isoscale": importlib.metadata.version("isoscale"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "fp8 matmul": pick_backend("auto", device),
        **_casts(device),
        "C++ compiler (torch.compile on a CPU)": shutil.which(os.environ.get("CXX", "g++")) or "none",
        "cache": str(cache),
        "cache writable": os.access(home, os.W_OK),
        "free disk": f"{shutil.disk_usage(home).free / 2**30:.1f} GiB",
        **{f"{name} ({extra})": importlib.util.find_spec(name) is not None for name, extra in EXTRAS.items()},
    }


def _casts(device: torch.device) -> dict[str, Any]:
    """Who runs casts, and which low-precision matmuls the device has."""
    from isoscale.formats.dispatch import kernel_for
    from isoscale.kernels import cpu, triton_cast
    from isoscale.numerics import capabilities

    found = capabilities(device)
    has = [kind for kind, reason in found.items() if not reason]
    return {
        "casts on a CPU": "C++ rows" if cpu.available() else f"torch reference: {cpu.why_not()}",
        "casts on CUDA": ("Triton" if triton_cast.available() else "torch reference: no Triton")
        + ("" if device.type == "cuda" else " (no CUDA device here)"),
        "casts in compiled graphs": {
            "cpp": "C++ rows, as an operator",
            "triton": "Triton, as an operator",
            "torch": "Inductor, from the torch reference",
        }[kernel_for(device.type)],
        "scaled_mm": ", ".join(has) or "none",
        **({f"no {kind}": reason for kind, reason in found.items() if reason} if has else {}),
    }


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do: device, casts, FP8 backend, compiler, optional packages.

    \b
    Examples:
      isoscale doctor
      isoscale doctor --json
    """
    facts = _facts()
    width = max(len(name) for name in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts.items()]
    if not facts["cache writable"]:
        lines.append("the cache folder cannot be written: set ISOSCALE_CACHE to another one")
    emit(as_json, facts, "\n".join(lines))
    if not facts["cache writable"]:
        raise typer.Exit(1)
