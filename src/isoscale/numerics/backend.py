"""Who multiplies: exact emulation on any device, or `torch._scaled_mm` where the hardware has the formats.

Emulated: operands are rounded to the format, the product is formed and accumulated in fp32. Real: the same codes, on
tensor cores. Both see the same operands; only the order and width of accumulation may differ. On a CPU `_scaled_mm` is
a slow reference loop, so it is an oracle in tests and never picked.
"""

from __future__ import annotations

from typing import Literal

import torch

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.formats.recipes import FP8, LayerFormats
from isoscale.nn.hardware import KINDS, kind_of, why_not
from isoscale.planning.cost import bits_per_value

Backend = Literal["emulated", "scaled_mm"]
BACKENDS = ("auto", "emulated", "scaled_mm")


def has_scaled_mm(device: torch.device) -> bool:
    """Whether the device multiplies plain FP8 in hardware (CUDA compute capability 8.9 or newer)."""
    return not why_not("fp8", device)


def why_emulated(formats: LayerFormats, device: torch.device, features: tuple[int, ...] = ()) -> str:
    """Why the tensor cores of a device cannot run a layer; empty where they can.

    Args:
        formats: of the layer. Matmuls with an operand of 16 or more bits run as plain ones and ask for nothing.
        device: where it runs.
        features: the layer's sizes, in and out.
    """
    found = set()
    for names, pair in zip(formats.passes.values(), formats.pairs):
        if max(map(bits_per_value, names)) >= 16 and min(map(bits_per_value, names)) >= 16:
            continue
        kind = kind_of(*pair)
        if kind is None:
            return f"no kernel multiplies {names[0]} by {names[1]}"
        found.add(kind)
    for kind in sorted(found):
        if reason := why_not(kind, device):
            return reason
        multiple = KINDS[kind].multiple
        for size in features:
            if size % multiple:
                return f"{kind} needs features that are multiples of {multiple}, not {size}"
    return "" if found else "nothing is cast below 16 bits"


def pick_backend(
    asked: str, device: torch.device, formats: LayerFormats | None = None, features: tuple[int, ...] = (),
    place: str = "",
) -> Backend:  # fmt: skip
    """The backend that will run.

    Args:
        asked: `auto`, `emulated` or `scaled_mm`; `auto` takes the hardware where it can run the formats.
        device: where.
        formats: of the layer; by default plain FP8.
        features: the layer's sizes.
        place: the layer's name, for the refusal.

    Raises:
        ConfigError: `scaled_mm` was asked for where it cannot run; says by name why.
    """
    if asked not in BACKENDS:
        hint = did_you_mean(asked, BACKENDS)
        raise ConfigError(f"unknown backend {asked!r}", key="numerics.backend", value=asked, hint=hint)
    if asked == "emulated":
        return "emulated"
    reason = why_emulated(formats or FP8, device, features)
    if asked == "scaled_mm" and reason and "16 bits" not in reason:
        raise ConfigError(
            "this device has no FP8 matmul" if device.type != "cuda" else "no hardware matmul for these formats",
            key="numerics.backend",
            value=asked,
            place=f"{place}: {reason}" if place else reason,
            hint="numerics.backend = 'emulated' gives the same casts on any device",
        )
    return "emulated" if reason else "scaled_mm"
