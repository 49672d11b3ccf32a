"""A linear layer whose three matmuls see operands in a low-precision format.

The cast sees logical values: a factor that a composite module deferred into this layer is applied before the cast, and
the unit factors after the matmul, so weights, inputs and output gradients are cast at the scale the plan predicts.
Under autocast the weight is cast from its own precision, not from a copy in the autocast dtype.
Straight-through: the casts themselves have gradient 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from isoscale.formats.recipes import LayerFormats
from isoscale.nn.engine import Engine, cast_matmul
from isoscale.nn.scale import compute_dtype, scale, scale_fwd, times

Recorder = Callable[[str, str, Tensor, int], None]
"""Called with (operand, format, the tensor before its cast, the axis of its blocks)."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's linear layer with a transposed weight [in, out] (GPT-2), known by its looks."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nx") and hasattr(module, "nf")


class CastLinear(nn.Module):
    """Stands in for a linear layer, under the same name, with the same Parameters.

    Args:
        inner: `isoscale.nn.Linear`, `LinearReadout`, `torch.nn.Linear` or a `Conv1D`; its Parameters are shared, not
            copied.
        formats: of the operands of its three matmuls.
        backend: `emulated` or `scaled_mm`.

    Attributes:
        casts: operand -> how often it was cast, in eager mode: `input` and `weight` (forward), `grad` and
            `backward_weight` (input gradient), `weight_grad` and `backward_input` (weight gradient). An operand whose
            cast serves two matmuls counts once, under its first name.
    """

    def __init__(self, inner: nn.Module, formats: LayerFormats, backend: str) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = getattr(inner, "weight", None)  # a tied readout has none of its own
        self.bias: nn.Parameter | None = getattr(inner, "bias", None)
        self.recast(formats, backend)
        self.casts: Counter[str] = Counter()
        self.recorder: Recorder | None = None
        self.multiplier: float = getattr(inner, "multiplier", 1.0)
        self.scaling: str | None = getattr(inner, "scaling", None)
        self._roles = dict(getattr(inner, "roles", {"weight": "hidden", "bias": "bias"}))
        own = getattr(inner, "factors", None)
        self._factors = own
        self.kind = type(inner).__name__
        self.w_axis = -2 if is_conv1d(inner) else -1

    @property
    def roles(self) -> Mapping[str, str]:
        """Role of each parameter, as in the layer it stands in for."""
        return self._roles

    def recast(self, formats: LayerFormats, backend: str) -> None:
        """Go on with other formats; Parameters and counts stay."""
        self.formats, self.backend = formats, backend
        self.engine = Engine(formats, backend)

    def _note(self, operand: str, fmt: str, x: Tensor, axis: int) -> None:
        self.casts[operand] += 1
        if self.recorder is not None:
            self.recorder(operand, fmt, x, axis)

    @property
    def features(self) -> tuple[int, int]:
        """Sizes in and out; those of a tied readout are not known here: none."""
        if self.weight is None:
            return (0, 0)
        first, second = (int(n) for n in self.weight.shape)
        return (first, second) if self.w_axis == -2 else (second, first)

    def factors(self, tokens: int | None = None) -> Any:
        """The factors of the layer it stands in for."""
        return self._factors(tokens) if self._factors is not None else None

    def forward(
        self, x: Tensor, *, pending: float = 1.0, skip: Tensor | None = None, branch_scale: float = 1.0,
        skip_scale: float = 1.0, tokens: int | None = None, weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `isoscale.nn.Linear.forward`: x [..., in] -> [..., out]; `weight` stands in for a tied readout's."""
        x = x.to(compute_dtype(x) or x.dtype)
        if pending != 1.0:
            x = x * pending
        count = tokens if tokens is not None else x.numel() // max(1, x.shape[-1])
        told, gain = self.factors(count), self.multiplier
        used = self.weight if weight is None else weight
        assert used is not None
        if told is not None and self.scaling == "unit":  # the residual's factor acts forward only
            scales = (told.forward * gain * branch_scale, told.input_grad * gain, told.weight_grad * gain)
            bias = None if self.bias is None else scale(self.bias, told.forward * branch_scale, told.weight_grad)
            skip = None if skip is None else scale_fwd(skip, skip_scale)
        else:
            scales = (gain * branch_scale,) * 3
            bias = None if self.bias is None else times(self.bias, scales[0] * pending)
            skip = None if skip is None else times(skip, skip_scale)
        flat = x.reshape(-1, x.shape[-1])
        y = self._multiply(flat, used, scales, count).view(*x.shape[:-1], used.shape[-3 - self.w_axis])
        if bias is not None:
            y = y + bias.to(y.dtype)
        if skip is not None:
            y = y + skip
        return y

    def _multiply(self, flat: Tensor, weight: Tensor, scales: tuple[float, float, float], tokens: int) -> Tensor:
        """The product of [rows, in] and the weight; `scales` of it and of its two gradients, `tokens` of the step."""
        return cast_matmul(flat, weight, self.engine, scales, self.w_axis, self._note, self.training)

    def extra_repr(self) -> str:
        """Formats per pass and backend, so that `print(model)` shows what runs."""
        shape = "tied" if self.weight is None else " -> ".join(map(str, self.features))
        return f"{self.kind} {shape}, {self.formats}, {self.backend}"
