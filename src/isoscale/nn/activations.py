"""Modules without parameters: nonlinearities, dropout, losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isoscale._base.errors import ConfigError
from isoscale.nn import functional as F
from isoscale.nn.constraints import check_constraint
from isoscale.nn.factors import check_mult


class GELU(nn.Module):
    """See `functional.gelu`."""

    def __init__(
        self, mult: float = 1.0, constraint: str | None = "to_output_scale", approximate: str = "none"
    ) -> None:
        super().__init__()
        self.mult, self.constraint, self.approximate = check_mult(mult), check_constraint(constraint), approximate

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return F.gelu(x, self.mult, self.constraint, self.approximate)


class SiLU(nn.Module):
    """See `functional.silu`."""

    def __init__(self, mult: float = 1.0, constraint: str | None = "to_output_scale") -> None:
        super().__init__()
        self.mult, self.constraint = check_mult(mult), check_constraint(constraint)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return F.silu(x, self.mult, self.constraint)


class Softmax(nn.Module):
    """See `functional.softmax`."""

    def __init__(
        self,
        dim: int,
        dtype: torch.dtype | None = None,
        constraint: str | None = "to_output_scale",
        mult: float = 1.0,
    ) -> None:
        super().__init__()
        self.dim, self.dtype = dim, dtype
        self.mult, self.constraint = check_mult(mult), check_constraint(constraint)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return F.softmax(x, self.dim, self.dtype, self.constraint, self.mult)


class Dropout(nn.Module):
    """See `functional.dropout`."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError("dropout must be in [0, 1)", key="p", value=p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return F.dropout(x, self.p, self.training)


class CrossEntropyLoss(nn.Module):
    """See `functional.cross_entropy`; classes are the last dimension."""

    def __init__(self, ignore_index: int = -100, label_smoothing: float = 0.0, mult: float = 1.0) -> None:
        super().__init__()
        self.ignore_index, self.label_smoothing, self.mult = ignore_index, label_smoothing, check_mult(mult)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """`logits [..., V]`, `targets [...]` to a scalar."""
        return F.cross_entropy(
            logits, targets, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, mult=self.mult
        )


class MSELoss(nn.Module):
    """See `functional.mse_loss`."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Equal shapes to a scalar."""
        return F.mse_loss(x, target)
