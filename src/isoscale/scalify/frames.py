"""One frame for the older methods: what they do with the scale that a rule predicts, and which tensors they measure.

Every rule predicts the scale of its output. A method is what becomes of that prediction, and what is measured:

    frame          predicted scale                          measured
    scalify        carried to the next operator             gradients at the inputs of norms: 2 a transformer block
    unit-scaling   dropped: the data go on, at scale 1      nothing
    loss-scaling   undone: 1 forward, 1/S on gradients      nothing
    dynamic        undone                                   both operands and the cotangent of each linear: 18 a block
    delayed        undone                                   the same, by the largest of the last steps

Carrying keeps the model's mathematics, dropping changes it (that is unit scaling: its factors are the rules' own),
undoing leaves fp16 or fp8 where they were without scales. Counts are those of a block with six linears.

These run in eager mode: they are for comparing methods and for tests, `scalify` is what one trains with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.scalify import registry, scales
from isoscale.scalify.ops import cast_on_backward, cast_on_forward, set_scaling
from isoscale.scalify.pair import Pair, under
from isoscale.scalify.placement import place_at_norms
from isoscale.scalify.tensor import ScaledTensor, as_scaled

M = TypeVar("M", bound=nn.Module)
HEADROOM = {"e4m3": 2.0**7, "e5m2": 2.0**14}
"""Where the largest magnitude of an operand goes, at the least: a factor of two more still is in the format."""


@dataclass(frozen=True)
class Frame:
    """A method, as a configuration of scaled tensors.

    Attributes:
        name: as users type it.
        predicted: what becomes of a rule's scale: `carry`, `drop` or `undo`.
        operands: how operands of linear layers are measured: `now`, `delayed` or not at all.
        norms: statistic of the rescale of gradients at norm inputs, or None.
        history: steps that `delayed` looks back.
        gradient_scale: what gradients are multiplied by (the S of loss scaling), a power of two.
        formats: of operands and of cotangents, where they are measured.
    """

    name: str
    predicted: Literal["carry", "drop", "undo"]
    operands: Literal["now", "delayed"] | None = None
    norms: str | None = None
    history: int = 1024
    gradient_scale: float = 1.0
    formats: tuple[str, str] = ("e4m3", "e5m2")

    @contextmanager
    def __call__(self) -> Iterator[Rescales]:
        """Forward and backward inside run in this frame; gives the count of rescales."""
        with _Policy(self) as policy:
            yield policy.counts

    def seed(self, loss: Tensor) -> Tensor:
        """The cotangent to start `loss.backward(...)` with: S under 1/S; 1 where scales are carried or dropped."""
        size = self.gradient_scale if self.predicted == "undo" else 1.0
        data = torch.full_like(loss._data if isinstance(loss, ScaledTensor) else loss, size)
        return ScaledTensor(data, torch.full((), 1.0 / size, device=data.device))


FRAMES = MappingProxyType({
    frame.name: frame for frame in (
        Frame("scalify", "carry", norms="l2"),
        Frame("unit-scaling", "drop"),
        Frame("loss-scaling", "undo", gradient_scale=2.0**15),
        Frame("dynamic", "undo", "now"),
        Frame("delayed", "undo", "delayed"),
    )
})  # fmt: skip


def frame(name: str) -> Frame:
    """A frame by name.

    Raises:
        ConfigError: no such frame.
    """
    if name not in FRAMES:
        raise ConfigError("no such frame", key="frame", value=name, hint=did_you_mean(name, list(FRAMES)))
    return FRAMES[name]


def in_frame(model: M, how: Frame, dtype: torch.dtype | None = None) -> M:
    """Put a plain model into a frame, in place: scaled parameters, measured operands, rescales at norms.

    Args:
        model: plain; its linear layers are measured if they are `nn.Linear`.
        how: the frame.
        dtype: of parameter data; by default as they are.
    """
    initial = None if how.predicted == "carry" else 1.0
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(as_scaled(p.detach(), initial, dtype), p.requires_grad)
                module._parameters[name] = made[id(p)]
    if how.operands is not None:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    setattr(parent, name, MeasuredLinear(child, how))
    if how.norms is not None:
        place_at_norms(model, how.norms)
    return model


@dataclass
class Rescales:
    """How often a scale was measured.

    Attributes:
        forward: in the forward pass.
        backward: in the backward pass.
    """

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.forward + self.backward


_MEASURED = (torch.ops.isoscale.rescale.default, torch.ops.isoscale.set_scale.default)


class _Policy(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator on scaled tensors, after autograd, and settles the scale of what a rule made."""

    def __init__(self, how: Frame) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.how, self.counts = how, Rescales()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        backward = torch._C._current_graph_task_id() != -1
        if func in _MEASURED:
            self.counts.backward += backward
            self.counts.forward += not backward
        row = registry.TABLE.get(func)  # an operator that writes has none: its target keeps the scale that it had
        if self.how.predicted == "carry" or row is None or row.kind == "layout" or func.namespace == "isoscale":
            return out
        target = 1.0 / self.how.gradient_scale if backward else 1.0
        return tree_map(lambda x: self._settle(x, target), out)

    def _settle(self, x: Any, target: float) -> Any:
        if not isinstance(x, ScaledTensor):
            return x
        scale = torch.full_like(x._scale, target)
        data = x._data if self.how.predicted == "drop" else under(Pair(x._data, x._scale), scale)
        return ScaledTensor(data, scale, x._part, x._options)


class Amax(nn.Module):
    """Puts a tensor under the power of two that brings its largest magnitude to the top of a format.

    Args:
        top: where the largest magnitude goes, to within a factor of two above.
        history: how many earlier magnitudes to take the largest of; 0 measures the tensor itself, now.
    """

    past: Tensor

    def __init__(self, top: float, history: int = 0) -> None:
        super().__init__()
        self.top, self.history = top, history
        self.register_buffer("past", torch.zeros(max(history, 1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The same value; with a history, the magnitude is noted for the next call."""
        assert isinstance(x, ScaledTensor)
        return set_scaling(x, self.scale(x))

    def scale(self, x: ScaledTensor) -> Tensor:
        """The scale for x, 0-d float32; 1 while nothing but zeros was seen."""
        with torch.no_grad():
            now = x._data.detach().float().abs().amax() * x._scale
            seen = self.past.amax() if self.history else now
            if self.history:
                self.past = torch.cat([self.past[1:], now.reshape(1)])
            found = scales.floor2(seen)
            assert isinstance(found, Tensor)
            return torch.where(found > 0, found / self.top, 1.0)


class _Cotangent(torch.autograd.Function):
    """Identity forward; measures and puts the gradient under its scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Amax) -> Tensor:
        ctx.amax = amax
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.amax(grad), None


class MeasuredLinear(nn.Module):
    """A linear layer whose operands and cotangent are measured and cast: three tensors, each once a step.

    Args:
        linear: whose weight and bias it takes.
        how: the frame.
    """

    def __init__(self, linear: nn.Linear, how: Frame) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        history = how.history if how.operands == "delayed" else 0
        self.formats = how.formats
        self.x_amax, self.w_amax = (Amax(HEADROOM[how.formats[0]], history) for _ in range(2))
        self.g_amax = Amax(HEADROOM[how.formats[1]], history)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        operand, cotangent = self.formats
        y = F.linear(cast_on_forward(self.x_amax(x), operand), cast_on_forward(self.w_amax(self.weight), operand))
        y = _Cotangent.apply(cast_on_backward(y, cotangent), self.g_amax)  # type: ignore[no-untyped-call]
        assert isinstance(y, Tensor)
        return y if self.bias is None else y + self.bias
