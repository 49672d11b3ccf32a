"""The rms of every site's tensor and of its gradient, as the model's own probe reports them (logical values)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SiteScale:
    """Measured scale at one site.

    Args:
        path, port: the site.
        rms: of the tensor.
        grad_rms: of the loss gradient with respect to it; None where none flows.
    """

    path: str
    port: str
    rms: float
    grad_rms: float | None


def site_scales(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[SiteScale, ...]:
    """One forward and backward pass with the model's probe; the scales in forward order.

    Args:
        model: a model whose forward takes `probe=` and returns a scalar loss.
        *args: of its forward.
        **kwargs: of its forward.
    """
    seen: list[tuple[str, str, float, list[float]]] = []

    def probe(path: str, port: str, value: Tensor, factor: float) -> None:
        grads: list[float] = []
        if value.requires_grad:
            value.register_hook(  # type: ignore[no-untyped-call]
                lambda grad: grads.append(_rms(grad) / factor)
            )  # d/d(logical) = d/d(value) / factor
        seen.append((path, port, _rms(value) * factor, grads))

    model.zero_grad(set_to_none=True)
    try:
        model(*args, probe=probe, **kwargs).backward()
    finally:
        model.zero_grad(set_to_none=True)
    return tuple(SiteScale(path, port, rms, grads[0] if grads else None) for path, port, rms, grads in seen)


def _rms(tensor: Tensor) -> float:
    return float(torch.sqrt(tensor.detach().float().square().mean()))
