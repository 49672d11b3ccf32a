"""Unit-scaled losses: the value users expect, gradients at unit scale.

The value is a mean, but the gradient is that of the *sum* times a constant, so that logits get unit-scale gradients
whatever the batch. Both factors act on the scalar, which costs nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_f
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale.nn.scale import scale, scale_bwd, scale_fwd


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mult: float = 1.0,
) -> Tensor:
    """Mean cross-entropy over the rows that are not ignored; logits get `V/sqrt(V-1)` times the gradient of the sum.

    Args:
        logits: `[..., V]`; unlike in torch the classes are always last.
        targets: integers of shape `logits.shape[:-1]`.
        ignore_index: targets of this value count neither in the value nor in the gradient.
        label_smoothing: as in torch.
        mult: alpha_loss, multiplies the logits forward only (arXiv 2407.17465, Table 2).

    Returns:
        A scalar, nats per counted row, at least float32; 0 when every row is ignored.

    Raises:
        ConfigError: shapes that do not match, fewer than two classes.
    """
    classes = logits.shape[-1]
    if classes < 2:
        raise ConfigError("cross-entropy needs at least two classes", key="logits.shape", value=tuple(logits.shape))
    if logits.shape[:-1] != targets.shape:
        raise ConfigError(
            "targets must have the shape of logits without its last dimension",
            key="targets.shape",
            value=tuple(targets.shape),
            hint=f"expected {tuple(logits.shape[:-1])}",
        )
    flat, rows = loss_rows(scale_fwd(logits, mult), targets)
    total = torch_f.cross_entropy(
        flat, rows, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    count = (rows != ignore_index).sum().clamp(min=1)
    return scale(total, 1 / count, classes / (classes - 1) ** 0.5)


def loss_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`logits [..., V]`, `targets [...]` as `[rows, V]` at least float32 and `[rows]`."""
    low = logits.dtype in (torch.bfloat16, torch.float16)
    return (logits.float() if low else logits).reshape(-1, logits.shape[-1]), targets.reshape(-1)


def mse_loss(x: Tensor, target: Tensor) -> Tensor:
    """Mean squared error; both inputs get `8^-1/2` times the gradient of the sum, which is unit scale at the start.

    Raises:
        ConfigError: different shapes.
    """
    if x.shape != target.shape:
        raise ConfigError("mse_loss does not broadcast", key="target.shape", value=tuple(target.shape))
    scaled = torch_f.mse_loss(scale_bwd(x, 8**-0.5), scale_bwd(target, 8**-0.5), reduction="sum")
    return scale_fwd(scaled, 1 / (x.numel() or 1))
