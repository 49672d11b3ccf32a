"""What a user puts into a model to steer scales: rescales, casts of data, ways in and out.

Operators of torch (`isoscale::rescale` and kin), so that a scaled tensor meets them in its dispatch like any other and
compiled graphs hold them. On plain tensors rescales do nothing and casts cast the values, so one model runs both ways.

Dynamic rescales (Scalify, arXiv 2407.17353, section 3): a statistic n of the *data*, rounded down to a power of two,
moves from the data into the scale: exact. The authors bound one call's n to 2^-14 from below; here data of zeros and
data that are not finite are left alone and there is no bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import Function

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.formats import Stochastic, by_name, fake_cast
from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, times, under, value
from isoscale.scalify.registry import rule
from isoscale.scalify.tensor import ScaledTensor

Statistic = Literal["l2", "l1", "max"]
STATISTICS: tuple[str, ...] = get_args(Statistic)


@torch.library.custom_op("isoscale::rescale", mutates_args=())
def _rescale(x: Tensor, statistic: str, due: Tensor | None = None) -> Tensor:
    return x.clone()


@_rescale.register_fake
def _(x: Tensor, statistic: str, due: Tensor | None = None) -> Tensor:
    return torch.empty_like(x)


_rescale.register_autograd(lambda ctx, grad: (grad, None, None))


def statistic_of(data: Tensor, statistic: str) -> Tensor:
    """n, 0-d float32: the power of two that a rescale moves into the scale; 1 where there is nothing to measure."""
    if data.numel() == 0:
        return torch.ones((), device=data.device)
    wide = data.float()
    if statistic == "l2":
        found = wide.square().mean().sqrt()
    elif statistic == "l1":
        found = wide.abs().mean()
    else:
        found = wide.abs().amax()
    n = scales.floor2(found)
    return torch.where(torch.isfinite(found) & (n > 0), n, 1.0)


@rule(torch.ops.isoscale.rescale.default)
def rescale_rule(x: Pair, statistic: str, due: Tensor | None = None) -> Pair:
    """s = s_x n, n the statistic of the data: measured, not predicted. A static scale stays as it is."""
    if not isinstance(x.scale, Tensor):
        return Pair(x.data.clone(), x.scale)
    n = statistic_of(x.data, statistic)
    n = torch.where(x.scale == 0, 1.0, n if due is None else torch.where(due, n, 1.0))
    return Pair(times(x.data, 1.0 / n), x.scale * n)


class _OnGradient(Function):
    """Identity forward; an operator on the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.change(grad), None


def _on_gradient(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    result: Tensor = _OnGradient.apply(x, change)  # type: ignore[no-untyped-call]
    return result


def _checked(statistic: str) -> str:
    if statistic not in STATISTICS:
        raise ConfigError("no such statistic", key="statistic", value=statistic,
                          hint=did_you_mean(statistic, STATISTICS))  # fmt: skip
    return statistic


def rescale(x: Tensor, statistic: str = "l2", due: Tensor | None = None) -> Tensor:
    """Move a statistic of the data into the scale; the value and its gradient are unchanged.

    Args:
        x: scaled; a plain tensor is returned as it is.
        statistic: `l2` (RMS), `l1` (mean magnitude) or `max`.
        due: 0-d bool: whether to do it this time.

    Raises:
        ConfigError: another statistic.
    """
    statistic = _checked(statistic)
    if not isinstance(x, ScaledTensor):
        return x
    result: Tensor = torch.ops.isoscale.rescale(x, statistic, due)
    return result


def rescale_grad(x: Tensor, statistic: str = "l2", due: Tensor | None = None) -> Tensor:
    """x itself; its gradient is rescaled on the way back. Arguments as for `rescale`."""
    statistic = _checked(statistic)
    if not isinstance(x, ScaledTensor):
        return x
    return _on_gradient(x, lambda grad: torch.ops.isoscale.rescale(grad, statistic, due))


def rescale_l2(x: Tensor) -> Tensor:
    """`rescale` by the RMS of the data."""
    return rescale(x, "l2")


def rescale_l1(x: Tensor) -> Tensor:
    """`rescale` by the mean magnitude of the data."""
    return rescale(x, "l1")


def rescale_max(x: Tensor) -> Tensor:
    """`rescale` by the largest magnitude of the data."""
    return rescale(x, "max")


def rescale_l2_grad(x: Tensor) -> Tensor:
    """`rescale_grad` by the RMS of the gradient's data."""
    return rescale_grad(x, "l2")


def rescale_l1_grad(x: Tensor) -> Tensor:
    """`rescale_grad` by the mean magnitude of the gradient's data."""
    return rescale_grad(x, "l1")


def rescale_max_grad(x: Tensor) -> Tensor:
    """`rescale_grad` by the largest magnitude of the gradient's data."""
    return rescale_grad(x, "max")


class Rescale(nn.Module):
    """A rescale as a module: visible in `print(model)`, movable, with a period.

    Args:
        statistic: `l2`, `l1` or `max`.
        direction: `forward`, `backward` for the gradient, or `both`.
        period: at every how many-th training call; 1 is always.

    Raises:
        ConfigError: another statistic or direction, a period below 1.
    """

    calls: Tensor

    def __init__(self, statistic: str = "l2", direction: str = "backward", period: int = 1) -> None:
        super().__init__()
        if direction not in ("forward", "backward", "both"):
            raise ConfigError("no such direction", key="direction", value=direction, hint="forward, backward or both")
        if period < 1:
            raise ConfigError("a period is at least 1", key="period", value=period)
        self.statistic, self.direction, self.period = _checked(statistic), direction, period
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x, rescaled in the direction; any shape."""
        due = None
        if self.period > 1:
            due = self.calls % self.period == 0
            if self.training:
                self.calls.add_(1)
        x = x if self.direction == "backward" else rescale(x, self.statistic, due)
        return x if self.direction == "forward" else rescale_grad(x, self.statistic, due)

    def extra_repr(self) -> str:
        """Statistic, direction, period."""
        return f"{self.statistic}, {self.direction}, period={self.period}"


@torch.library.custom_op("isoscale::cast_data", mutates_args=())
def _cast_data(x: Tensor, fmt: str, axis: int = -1, seed: Tensor | None = None) -> Tensor:
    y = _cast(x, fmt, axis, seed)
    return y.clone() if y is x else y


@_cast_data.register_fake
def _(x: Tensor, fmt: str, axis: int = -1, seed: Tensor | None = None) -> Tensor:
    return torch.empty_like(x)


_cast_data.register_autograd(lambda ctx, grad: (grad, None, None, None))


def _cast(data: Tensor, fmt: str, axis: int, seed: Tensor | None) -> Tensor:
    found = by_name(fmt)
    if seed is None:
        return fake_cast(data, found, axis=axis)
    return fake_cast(data, found, axis=axis, rounding=Stochastic(seed))


@rule(torch.ops.isoscale.cast_data.default)
def cast_rule(x: Pair, fmt: str, axis: int = -1, seed: Tensor | None = None) -> Pair:
    """s = s_x: a cast acts on the data."""
    y = _cast(x.data, fmt, axis, seed)
    return Pair(y.clone() if y is x.data else y, x.scale)


def cast_on_forward(x: Tensor, fmt: str, axis: int = -1) -> Tensor:
    """The data rounded to a format, saturating, in their own dtype; the gradient passes straight through.

    Args:
        x: scaled, or plain (then its values are cast).
        fmt: any name of `isoscale.formats`, such as `e4m3` or `mxfp8_e4m3`.
        axis: along which blocks lie.

    Raises:
        ConfigError: no such format.
    """
    by_name(fmt)
    result: Tensor = torch.ops.isoscale.cast_data(x, fmt, axis)
    return result


def cast_on_backward(x: Tensor, fmt: str, axis: int = -1) -> Tensor:
    """x itself; the data of its gradient are rounded to a format. Arguments as for `cast_on_forward`."""
    by_name(fmt)
    return _on_gradient(x, lambda grad: torch.ops.isoscale.cast_data(grad, fmt, axis))


@torch.library.custom_op("isoscale::set_scale", mutates_args=())
def _set_scale(x: Tensor, scale: Tensor) -> Tensor:
    return x.clone()


@_set_scale.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


_set_scale.register_autograd(lambda ctx, grad: (grad, None))


@rule(torch.ops.isoscale.set_scale.default)
def set_scale_rule(x: Pair, scale: Any) -> Pair:
    """s as given; the data take up the rest."""
    s = scale.scale if isinstance(scale, Pair) else scale
    data = under(x, s)
    return Pair(data.clone() if data is x.data else data, s)


def set_scaling(x: Tensor, scale: float | Tensor) -> Tensor:
    """The same value under another scale; the gradient is unchanged.

    Args:
        x: scaled; a plain tensor is returned as it is.
        scale: a power of two; a number or a 0-d tensor.

    Raises:
        ConfigError: a number that is no power of two.
    """
    from isoscale.scalify.errors import wrong_scale

    if isinstance(scale, (int, float)):
        if not scales.is_power_of_two(scale):
            raise wrong_scale(scale)
        scale = torch.full((), float(scale), device=x.device)
    if not isinstance(x, ScaledTensor):
        return x
    result: Tensor = torch.ops.isoscale.set_scale(x, scale)
    return result


@torch.library.custom_op("isoscale::stop_scaling", mutates_args=())
def _stop_scaling(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = x.to(dtype)
    return y.clone() if y is x else y


@_stop_scaling.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("isoscale::scale_like", mutates_args=())
def _scale_like(x: Tensor, like: Tensor) -> Tensor:
    y = x.to(like.dtype)
    return y.clone() if y is x else y


@_scale_like.register_fake
def _(x: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=like.dtype)


@rule(torch.ops.isoscale.stop_scaling.default)
def stop_scaling_rule(x: Pair, dtype: torch.dtype) -> Tensor:
    """No scale: the plain value."""
    y: Tensor = value(x, dtype)
    return y.clone() if y is x.data else y


@rule(torch.ops.isoscale.scale_like.default)
def scale_like_rule(x: Any, like: Pair) -> Pair:
    """s = the power of two below the RMS of a plain x; that of x if it has one; 1 where `like` is static."""
    if isinstance(x, Pair):
        return Pair(x.data.to(like.data.dtype, copy=True), x.scale)
    if not isinstance(like.scale, Tensor):
        return Pair(x.to(like.data.dtype, copy=True), 1.0)
    n = statistic_of(x, "l2")
    return Pair((x.float() / n).to(like.data.dtype), n)


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


_stop_scaling.register_autograd(
    lambda ctx, grad: (torch.ops.isoscale.scale_like(grad, ctx.saved_tensors[0]), None), setup_context=_remember
)


def stop_scaling(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The plain value, inside a model too (compiled or not); the gradient comes back scaled, by its measured RMS.

    Args:
        x: scaled, or plain (then only its dtype changes).
        dtype: of the result.
    """
    result: Tensor = torch.ops.isoscale.stop_scaling(x, dtype)
    return result
