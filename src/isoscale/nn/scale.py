"""Multiplying a tensor by one factor forward and by another backward.

This is the primitive of unit scaling (arXiv 2303.11257, section 3): forward and gradient scales are set apart, which
is a legal change of gradient because a constant on a whole gradient only rescales the learning rate of what is
upstream. Multiplications by exactly 1.0 never run. `vmap`, `grad` and `jvp` work; `jvp` is the derivative of the
*forward*, so it is linear in the forward factor and knows nothing of the backward one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Factor = float | Tensor
"""A Python float, a symbolic float (dynamic torch.compile) or a 0-d tensor."""


def is_one(factor: Factor) -> bool:
    """Whether `factor` is the Python number 1. Symbolic and tensor factors are not asked: that would specialise."""
    if torch.compiler.is_compiling() and not is_known(factor):
        return False
    return type(factor) in (int, float) and bool(factor == 1)


def is_known(factor: Factor) -> bool:
    """Under torch.compile: whether the compiler sees a constant in `factor`, not a symbol or a tensor."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # a second, which only compiled code spends

    return isinstance(factor, int | float) and bool(has_static_value(factor))


def times(x: Tensor, factor: Factor) -> Tensor:
    """`x * factor` in both directions, or `x` itself when the factor is 1."""
    return x if is_one(factor) else x * factor


def call(plain: type[Function], with_jvp: type[Function], *args: Any) -> Any:
    """Apply `plain` under torch.compile, `with_jvp` otherwise.

    `Function.apply` inspects the signature of `forward` at every call, for default arguments that are not used here;
    that is half the cost of a small op, so outside torch.func the C++ entry below it is called.
    """
    if torch.compiler.is_compiling():
        return plain.apply(*args)  # type: ignore[no-untyped-call]
    if torch._C._are_functorch_transforms_active():
        return with_jvp.apply(*args)  # type: ignore[no-untyped-call]
    return super(Function, with_jvp).apply(*args)  # type: ignore[misc]


def add(x: Tensor, y: Tensor, factor: float, *, fresh: bool = False) -> Tensor:
    """`x + factor * y` in one pass; in the memory of a `fresh` x where that may be overwritten."""
    if torch.compiler.is_compiling():
        return x + times(y, factor)  # the `alpha` of torch's add would be taken for a constant
    return x.add_(y, alpha=factor) if fresh and may_overwrite() else x.add(y, alpha=factor)


def may_overwrite() -> bool:
    """Whether a result just made may be overwritten: eager, outside torch.func, no graph recorded.

    Fresh memory is what costs on a CPU: a pass into it takes several times a pass in place.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return not torch._C._are_functorch_transforms_active()


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast dtype in force on the device of `x`, or None outside autocast."""
    kind = x.device.type
    if kind == "meta":  # torch knows no autocast there
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def autocast_operands(*tensors: Tensor | None) -> list[Any]:
    """Cast floating operands as autocast would for a matmul; outside autocast they come back untouched.

    Autograd Functions run their backward outside autocast, so casting at the entry is what keeps both passes in the
    same dtype.
    """
    dtype = next((compute_dtype(t) for t in tensors if t is not None), None)
    if dtype is None:
        return list(tensors)
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


class _Scale(Function):
    """y = forward * x, dx = backward * dy. Has no jvp: Dynamo refuses Functions that define one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, forward_factor: Factor, backward_factor: Factor) -> Tensor:
        return x.view_as(x) if is_one(forward_factor) else x * forward_factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factors = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return times(grad, ctx.factors[1]), None, None


class _ScaleJvp(_Scale):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        forward_factor = ctx.factors[0]
        return tangent.view_as(tangent) if is_one(forward_factor) else tangent * forward_factor


def scale(x: Tensor, forward: Factor = 1.0, backward: Factor = 1.0) -> Tensor:
    """`forward * x`, whose gradient is `backward * grad`. Shape and dtype of `x`."""
    if is_one(forward) and is_one(backward):
        return x
    if forward is backward:
        return x * forward
    result: Tensor = call(_Scale, _ScaleJvp, x, forward, backward)
    return result


def scale_fwd(x: Tensor, factor: Factor) -> Tensor:
    """`factor * x`; the gradient passes unchanged."""
    return scale(x, factor, 1.0)


def scale_bwd(x: Tensor, factor: Factor) -> Tensor:
    """`x`; the gradient is multiplied by `factor`."""
    return scale(x, 1.0, factor)


class _Blend(Function):
    """y = a * branch + b * skip; both gradients pass with factor 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(branch: Tensor, skip: Tensor, a: float, b: float) -> Tensor:
        return blend(branch, skip, a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        branch, skip, ctx.a, ctx.b = inputs
        ctx.dtypes = branch.dtype, skip.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.to(ctx.dtypes[0]), grad.to(ctx.dtypes[1]), None, None


class _BlendJvp(_Blend):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, branch: Tensor, skip: Tensor, *_: Any) -> Tensor:
        return blend(branch, skip, ctx.a, ctx.b)


def blend(branch: Tensor, skip: Tensor, a: float, b: float) -> Tensor:
    """`a * branch + b * skip` with ordinary gradients; equal shapes."""
    return add(times(skip, b), branch, a)


def residual_blend(branch: Tensor, skip: Tensor, a: float, b: float) -> Tensor:
    """`a * branch + b * skip`, both gradients passed on with factor 1 (u-muP residual add). Equal shapes."""
    result: Tensor = call(_Blend, _BlendJvp, branch, skip, a, b)
    return result
