"""Matmul and linear layer with cast operands, for models of one's own: as torch's, with formats beside."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from isoscale._base.errors import ConfigError
from isoscale.formats import Format
from isoscale.formats.recipes import LayerFormats, everywhere
from isoscale.nn.engine import Engine, cast_matmul
from isoscale.nn.scale import compute_dtype


def _formats(formats: LayerFormats | Format | str) -> LayerFormats:
    if isinstance(formats, LayerFormats):
        return formats
    return everywhere(formats if isinstance(formats, str) else str(formats))


def matmul(a: Tensor, b: Tensor, formats: LayerFormats | Format | str) -> Tensor:
    """`torch.matmul(a, b)` with cast operands, emulated; differentiable, each of its three matmuls with its formats.

    `a` plays the input and `b` the weight. Blocks lie along the contraction axis of each matmul: k forward, n for the
    gradient of a, m for the gradient of b. As in torch.matmul, the batch of an `a` beside a matrix `b` counts as rows,
    so that blocks of the gradient of b run along all of them.

    Args:
        a: [..., m, k] or [k].
        b: [..., k, n] or [k].
        formats: of the operands; a name or a format means that one for all of them.

    Returns:
        As torch.matmul, in the dtype of `a`; the sums are formed in fp32.

    Raises:
        ConfigError: shapes or dtypes that do not go together; an unknown format.
    """
    if not a.dim() or not b.dim() or a.shape[-1] != b.shape[0 if b.dim() == 1 else -2]:
        shapes = f"{tuple(a.shape)} @ {tuple(b.shape)}"
        raise ConfigError("these shapes cannot be multiplied", key="matmul", value=shapes)
    if a.dtype != b.dtype or not a.is_floating_point():
        raise ConfigError(
            "both operands must have one floating-point dtype", key="dtype", value=f"{a.dtype}, {b.dtype}"
        )
    engine = Engine(_formats(formats))
    left = a.unsqueeze(0) if a.dim() == 1 else a
    right = b.unsqueeze(1) if b.dim() == 1 else b
    rows = left.shape[:-1]
    if right.dim() == 2:
        left = left.flatten(0, -2)
    out = cast_matmul(left, right, engine, w_axis=-2)
    if right.dim() == 2:
        out = out.reshape(*rows, right.shape[-1])
    if a.dim() == 1:
        out = out.squeeze(-2)
    return out.squeeze(-1) if b.dim() == 1 else out


class Linear(nn.Linear):
    """`torch.nn.Linear` whose three matmuls see cast operands, emulated.

    Args:
        in_features: as in torch.
        out_features: as in torch.
        bias: as in torch; it is added in high precision.
        formats: of the operands; a name or a format means that one for all of them.
        device: as in torch.
        dtype: as in torch.

    Raises:
        ConfigError: no features; an unknown format.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, formats: LayerFormats | Format | str,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        for key, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ConfigError("a linear needs at least one feature", key=key, value=size)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.engine = Engine(_formats(formats))
        self.casts: Counter[str] = Counter()

    def _note(self, operand: str, fmt: str, x: Tensor, axis: int) -> None:
        self.casts[operand] += 1

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        x = input.to(compute_dtype(input) or input.dtype)
        flat = x.reshape(-1, x.shape[-1])
        out = cast_matmul(flat, self.weight, self.engine, note=self._note, training=self.training)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.engine.formats}, {self.engine.backend}"
