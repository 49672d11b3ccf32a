"""isoscale doctor: what this machine can do, and what is wrong in a set-up."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isoscale._base.errors import ConfigError
from isoscale.cli.common import AsJson, emit

if TYPE_CHECKING:
    import torch

    from isoscale.check.doctor import Diagnosis

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


def _indented(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=f"  {head:5s}", subsequent_indent=" " * 7, break_on_hyphens=False,
                         break_long_words=False)  # fmt: skip


def screen(found: Diagnosis) -> str:
    """What `isoscale doctor --model` prints."""
    from isoscale.check.findings_view import like

    sizes = ", ".join(f"{axis} {width} x {depth}" for axis, (width, depth) in found.sizes.items())
    lines = [f"{found.name}: {sizes} (width x depth)"]
    lines.append(
        f"learning rates: {found.law}" if found.law != "none"
        else "no optimiser of Adam's kind was given: LR, eps and decay were not compared"
    )  # fmt: skip
    away = like([name for _, name, _, _ in found.departures])
    if away:
        shown = ", ".join(away[:4]) + (f" and {len(away) - 4} more" if len(away) > 4 else "")
        lines += textwrap.wrap(f"  leaving that law: {shown}", 80, subsequent_indent="    ", break_on_hyphens=False)
    for fault in found.faults:
        count = f" ({len(fault.tensors)} tensors)" if len(fault.tensors) > 1 else ""
        lines += ["", f"{fault.name}{count}", *_indented("what", fault.what), *_indented("why", fault.why),
                  *_indented("do", fault.remedy)]  # fmt: skip
    number = len(found.faults)
    lines += ["", f"{number} finding{'' if number == 1 else 's'}" if number else "nothing found"]
    return "\n".join(lines)


def _examined(model: str, width: str, depth: str, as_json: bool) -> int:
    from isoscale.check.doctor import examine

    found = examine(model, numbers(width, "--width"), numbers(depth, "--depth"))
    emit(as_json, found.to_dict(), screen(found))
    return 1 if found.faults else 0


def numbers(text: str, flag: str) -> tuple[int, ...]:
    """Whole numbers with commas between.

    Raises:
        ConfigError: something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError("sizes are whole numbers with commas between", key=flag, value=text,
                          hint=f"{flag} 2,8") from None  # fmt: skip


def doctor(
    model: Annotated[str | None, typer.Option("--model", metavar="MODULE:FUNCTION",
                     help="A function setup(width, depth) -> model, optimizer: find what is wrong in it.")] = None,
    width: Annotated[str | None, typer.Option("--width", help="The base's and a larger one; default 64,256.",
                                              metavar="N,N")] = None,
    depth: Annotated[str | None, typer.Option("--depth", help="The base's and a larger one; default 2,8.",
                                              metavar="N,N")] = None,
    as_json: AsJson = False,
) -> int:  # fmt: skip
    """Say what this machine can do; or, with --model, what is wrong in your set-up.

    \b
    Examples:
      isoscale doctor
      isoscale doctor --model train:setup
      isoscale doctor --model train:setup --width 128,512 --depth 4 --json
    """
    if model is not None:
        return _examined(model, width or "64,256", depth or "2,8", as_json)
    for flag, value in (("--width", width), ("--depth", depth)):
        if value is not None:
            raise ConfigError(f"{flag} goes with --model", key=flag, value=value, hint="--model train:setup")
    facts = _facts()
    room = max(len(name) for name in facts)
    lines = [f"{name.ljust(room)}  {value}" for name, value in facts.items()]
    if not facts["cache writable"]:
        lines.append("the cache folder cannot be written: set ISOSCALE_CACHE to another one")
    emit(as_json, facts, "\n".join(lines))
    return 0 if facts["cache writable"] else 1
