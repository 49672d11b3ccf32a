"""`custom_scale`: a function with a scale rule of one's own (described in arXiv 2407.17353, section 2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.tensor import ScaledTensor

_NAMESPACE = "isoscale_custom"


def _filled(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The user's rule with a gradient of zeros in the place of each None."""

    def rule_of_gradient(grad: Any, *xs: Any) -> Any:
        """As the user's rule says."""
        found = backward(grad, *xs)
        found = found if isinstance(found, (tuple, list)) else [found]
        return [Pair(torch.zeros_like(x.data), 0.0) if g is None else g for g, x in zip(found, map(lift, xs))]

    return rule_of_gradient


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

    def differentiated(grad: Tensor, *xs: Tensor) -> list[Tensor | None]:
        """By autograd, and so by the rules of the function's operators where tensors are scaled."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in xs]
            return list(torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True))

    op = torch.library.custom_op(f"{_NAMESPACE}::{title}", plain, mutates_args=(), schema=f"({inputs}) -> Tensor")
    op.register_fake(lambda *xs: torch.empty_like(function(*xs)))
    namespace = getattr(torch.ops, _NAMESPACE)
    rule(getattr(namespace, title).default)(forward)
    by_rule: Callable[..., Any] | None = None
    if backward is not None:
        schema = f"(Tensor g, {inputs}) -> Tensor[]"
        back = torch.library.custom_op(
            f"{_NAMESPACE}::{title}_backward", lambda g, *xs: [torch.zeros_like(x) for x in xs], mutates_args=(),
            schema=schema,
        )  # fmt: skip
        back.register_fake(lambda g, *xs: [torch.empty_like(x) for x in xs])
        by_rule = getattr(namespace, f"{title}_backward")
        rule(getattr(by_rule, "default"))(_filled(backward))  # noqa: B009 - an overload packet has it

    def remember(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = isinstance(grad, ScaledTensor) or any(isinstance(x, ScaledTensor) for x in ctx.saved_tensors)
        way = by_rule if by_rule is not None and scaled else differentiated
        return tuple(way(grad, *ctx.saved_tensors))

    op.register_autograd(gradients, setup_context=remember)
    packet = getattr(namespace, title)

    def call(*xs: Tensor) -> Tensor:
        result: Tensor = packet(*xs)
        return result

    call.__name__, call.__doc__ = title, function.__doc__
    return call
