"""`custom_scale`: a function with a scale rule of one's own (described in arXiv 2407.17353, section 2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale.scalify import scales
from isoscale.scalify.pair import Pair
from isoscale.scalify.registry import rule

_NAMESPACE = "isoscale_custom"


def custom_scale(
    function: Callable[..., Tensor], forward: Callable[..., Pair], backward: Callable[..., Any] | None = None,
    name: str | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    """Give a function of tensors a rule as a whole, instead of the rules of the operators inside it.

    Args:
        function: of tensors only, to one tensor; pure. Plain tensors go through it unchanged.
        forward: the rule: pairs in (plain tensors where the caller gave such), a `Pair` out.
        backward: the rule of the gradient: (gradient, *inputs) as pairs in, one `Pair` (or None) per input out. By
            default the function is differentiated by the rules of its operators.
        name: of the operator, by default the function's.

    Returns:
        The function: same signature, for plain and scaled tensors, eager and compiled.

    Raises:
        ConfigError: a function with other than plain positional parameters, or a name that is taken.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise ConfigError("a custom scale is for tensors in fixed positions", key="function",
                          value=str(inspect.signature(function)))  # fmt: skip
    title = name or function.__name__
    if not title.isidentifier():
        raise ConfigError("an operator's name is an identifier", key="name", value=title, hint='name="my_gate"')
    if hasattr(getattr(torch.ops, _NAMESPACE), title):
        raise ConfigError("a custom scale of this name is there", key="name", value=title, hint="name=...")
    count = len(parameters)
    inputs = ", ".join(f"Tensor x{i}" for i in range(count))

    def plain(*xs: Tensor) -> Tensor:
        y = function(*xs)
        return y.clone() if any(y is x for x in xs) else y

    def plain_backward(grad: Tensor, *xs: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in xs]
            grads = torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g.clone() for x, g in zip(xs, grads)]

    op = torch.library.custom_op(f"{_NAMESPACE}::{title}", plain, mutates_args=(), schema=f"({inputs}) -> Tensor")
    op.register_fake(lambda *xs: torch.empty_like(function(*xs)))
    back = torch.library.custom_op(
        f"{_NAMESPACE}::{title}_backward", plain_backward, mutates_args=(), schema=f"(Tensor g, {inputs}) -> Tensor[]"
    )
    back.register_fake(lambda grad, *xs: [torch.empty_like(x) for x in xs])

    def remember(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    namespace = getattr(torch.ops, _NAMESPACE)
    packet, back_packet = getattr(namespace, title), getattr(namespace, f"{title}_backward")
    op.register_autograd(
        lambda ctx, grad: tuple(back_packet(grad, *ctx.saved_tensors)), setup_context=remember
    )
    rule(packet.default)(forward)

    def through_rules(grad: Any, *xs: Any) -> Any:
        """As the rules of the function's operators give it."""
        from isoscale.scalify.tensor import ScaledTensor

        def wrap(x: Any) -> Any:
            return ScaledTensor(x.data, scales.as_tensor(x.scale, x.data)) if isinstance(x, Pair) else x

        return [Pair(g._data, g._scale) if isinstance(g, ScaledTensor) else g
                for g in plain_backward(wrap(grad), *map(wrap, xs))]  # fmt: skip

    def own(grad: Any, *xs: Any) -> Any:
        """As the user's rule gives it."""
        assert backward is not None
        found = backward(grad, *xs)
        found = found if isinstance(found, (tuple, list)) else [found]
        return [Pair(torch.zeros_like(x.data), x.scale * 0) if g is None else g for g, x in zip(found, xs)]

    rule(back_packet.default)(through_rules if backward is None else own)

    def call(*xs: Tensor) -> Tensor:
        result: Tensor = packet(*xs)
        return result

    call.__name__, call.__doc__ = title, function.__doc__
    return call
