"""Who multiplies: exact emulation on any device, or torch._scaled_mm where the hardware has FP8.

Emulated: operands are rounded to the format, the product is formed and accumulated in fp32. Real: the same codes, FP8
tensor cores. Both see the same operands; only the order and width of accumulation may differ. On a CPU `_scaled_mm` is
a slow reference loop, so it is an oracle in tests and never picked.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale.formats import by_name, fake_cast, saturating_cast

Backend = Literal["emulated", "scaled_mm"]
_FP8 = ("e4m3", "e5m2")


def has_scaled_mm(device: torch.device) -> bool:
    """Whether the device multiplies FP8 in hardware (CUDA compute capability 8.9 or newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def pick_backend(asked: str, device: torch.device) -> Backend:
    """The backend that will run.

    Raises:
        ConfigError: `scaled_mm` was asked for where the hardware has none.
    """
    if asked == "scaled_mm" and not has_scaled_mm(device):
        raise ConfigError(
            "this device has no FP8 matmul",
            key="numerics.backend",
            value=asked,
            place=str(device),
            hint="numerics.backend = 'emulated' gives the same casts on any device",
        )
    if asked not in ("auto", "emulated", "scaled_mm"):
        raise ConfigError(
            f"unknown backend {asked!r}", key="numerics.backend", value=asked, hint="auto, emulated or scaled_mm"
        )
    return "scaled_mm" if asked != "emulated" and has_scaled_mm(device) else "emulated"


def cast_operand(x: Tensor, fmt: str) -> Tensor:
    """An operand rounded to a format, kept in its own dtype; `fp32` leaves it as it is."""
    return x if fmt == "fp32" else fake_cast(x, by_name(fmt))


def matmul(a: Tensor, b: Tensor, a_format: str, b_format: str, scale: float, backend: str) -> Tensor:
    """scale x a @ b for 2-D operands that are already on their formats' grids.

    Args:
        a: [m, k], values on the grid of `a_format`.
        b: [k, n], values on the grid of `b_format`.
        a_format: element format of `a`, or `fp32`.
        b_format: of `b`.
        scale: a plain factor, applied after accumulation.
        backend: `emulated` or `scaled_mm`; the latter is used where both formats are FP8 and not both E5M2.
    """
    if backend == "scaled_mm" and a_format in _FP8 and b_format in _FP8 and (a_format, b_format) != ("e5m2", "e5m2"):
        one = torch.ones((), device=a.device)
        left = saturating_cast(a, by_name(a_format)).contiguous()
        right = saturating_cast(b.t(), by_name(b_format)).contiguous().t()
        out: Tensor = torch._scaled_mm(left, right, scale_a=one * scale, scale_b=one, out_dtype=torch.bfloat16)
        return out.to(a.dtype)
    return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=scale)
