"""A linear layer whose three matmuls see operands in a low-precision format.

The cast sees logical values: a factor that a composite module deferred into this layer is applied before the cast, and
the unit factors after the matmul, so weights, inputs and output gradients are cast at the scale the plan predicts.
Straight-through: the casts themselves have gradient 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isoscale.formats.recipes import LayerFormats
from isoscale.nn.scale import scale_fwd
from isoscale.numerics.backend import cast_operand, matmul

Recorder = Callable[[str, str, Tensor], None]
"""Called with (operand: weight / input / grad, format, the tensor before its cast)."""


class _CastLinear(torch.autograd.Function):
    """y = fwd x q(x) q(W)^T;  dx = gin x q(g) q(W);  dW = gw x q(g)^T q(x)."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, formats: LayerFormats, scales: tuple[float, float, float], backend: str,
        recorder: Recorder | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        flat = cast_operand(x.reshape(-1, x.shape[-1]), formats.input)
        cast = cast_operand(weight, formats.weight)
        out = matmul(flat, cast.t(), formats.input, formats.weight, scales[0], backend)
        return out.view(*x.shape[:-1], weight.shape[0]), flat, cast

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, _, ctx.formats, ctx.scales, ctx.backend, ctx.recorder = inputs
        ctx.shape = x.shape
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.save_for_backward(output[1], output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 6
        flat, weight = ctx.saved_tensors
        formats: LayerFormats = ctx.formats
        raw = grads[0].reshape(-1, grads[0].shape[-1])
        if ctx.recorder is not None:
            ctx.recorder("grad", formats.grad, raw)
        grad = cast_operand(raw, formats.grad)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = matmul(grad, weight, formats.grad, formats.weight, ctx.scales[1], ctx.backend).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw = matmul(grad.t(), flat, formats.grad, formats.input, ctx.scales[2], ctx.backend)
        return dx, dw, None, None, None, None


class CastLinear(nn.Module):
    """Stands in for a linear layer, under the same name, with the same Parameters.

    Args:
        inner: `isoscale.nn.Linear`, `LinearReadout` or `torch.nn.Linear`; its Parameters are shared, not copied.
        formats: of weight, input and output gradient.
        backend: `emulated` or `scaled_mm`.
    """

    def __init__(self, inner: nn.Module, formats: LayerFormats, backend: str) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = getattr(inner, "weight", None)  # a tied readout has none of its own
        self.bias: nn.Parameter | None = getattr(inner, "bias", None)
        self.formats, self.backend = formats, backend
        self.recorder: Recorder | None = None
        self.multiplier: float = getattr(inner, "multiplier", 1.0)
        self.scaling: str | None = getattr(inner, "scaling", None)
        self.roles: Mapping[str, str] = getattr(inner, "roles", self._plain_roles)
        own = getattr(inner, "factors", None)
        self._factors = own
        self.kind = type(inner).__name__

    _plain_roles: ClassVar[Mapping[str, str]] = {"weight": "hidden", "bias": "bias"}

    def factors(self, tokens: int | None = None) -> Any:
        """The factors of the layer it stands in for."""
        return self._factors(tokens) if self._factors is not None else None

    def forward(
        self, x: Tensor, *, pending: float = 1.0, skip: Tensor | None = None, branch_scale: float = 1.0,
        skip_scale: float = 1.0, tokens: int | None = None, weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `isoscale.nn.Linear.forward`: x [..., in] -> [..., out]; `weight` stands in for a tied readout's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if pending != 1.0:
            x = x * pending
        count = tokens if tokens is not None else x.numel() // max(1, x.shape[-1])
        told = self.factors(count)
        scales = (told.forward, told.input_grad, told.weight_grad) if told is not None else (1.0, 1.0, 1.0)
        if self.multiplier != 1.0:
            scales = (scales[0] * self.multiplier, scales[1] * self.multiplier, scales[2] * self.multiplier)
        used = self.weight if weight is None else weight
        assert used is not None
        weight = used.to(x.dtype)
        if self.recorder is not None:
            self.recorder("weight", self.formats.weight, weight)
            self.recorder("input", self.formats.input, x)
        y: Tensor = _CastLinear.apply(  # type: ignore[no-untyped-call]
            x, weight, self.formats, scales, self.backend, self.recorder
        )[0]
        if self.bias is not None:
            y = y + self.bias.to(y.dtype) * scales[0]
        if branch_scale != 1.0:
            y = y * branch_scale if self.scaling != "unit" else scale_fwd(y, branch_scale)
        if skip is not None:
            y = y + (skip if skip_scale == 1.0 else scale_fwd(skip, skip_scale))
        return y

    def extra_repr(self) -> str:
        """Formats and backend, so that `print(model)` shows what runs."""
        shape = f"{self.weight.shape[1]} -> {self.weight.shape[0]}" if self.weight is not None else "tied"
        casts = f"w {self.formats.weight}, x {self.formats.input}, g {self.formats.grad}"
        return f"{self.kind} {shape}, {casts}, {self.backend}"
