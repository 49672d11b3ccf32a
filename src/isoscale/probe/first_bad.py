"""Which tensor went non-finite first: weights, then activations in forward order, then gradients in backward order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def _bad(tensor: Tensor) -> str | None:
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return None
    nans = int(torch.isnan(tensor).sum())
    return f"{nans} NaN and {int((~torch.isfinite(tensor)).sum()) - nans} Inf among {tensor.numel()} values"


def first_bad(model: nn.Module, loss: Callable[[], Tensor]) -> str:
    """A sentence naming the first non-finite tensor of one forward and backward pass.

    Args:
        model: the model; its gradients are cleared.
        loss: runs the forward on the offending batch and returns the scalar loss.
    """
    for name, parameter in model.named_parameters():
        if (what := _bad(parameter.detach())) is not None:
            return f"weight {name}: {what}"
    found: list[str] = []

    def hook(path: str) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor) and (what := _bad(output.detach())) is not None:
                found.append(f"output of {path or 'the model'} ({type(module).__name__}): {what}")

        return look

    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules()]
    order: list[str] = []

    def grad_hook(name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            if parameter.grad is not None and (what := _bad(parameter.grad)) is not None:
                order.append(f"gradient of {name}: {what}")

        return look

    tensor_hooks = [
        parameter.register_post_accumulate_grad_hook(grad_hook(name))  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        model.zero_grad(set_to_none=True)
        value = loss()
        if not found and _bad(value.detach()) is None:
            value.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in [*handles, *tensor_hooks]:
            handle.remove()
        model.zero_grad(set_to_none=True)
    if found:
        return found[0]
    if order:
        return order[0]
    if (what := _bad(value.detach())) is not None:
        return f"the loss: {what}"
    return "nothing non-finite when the step was repeated; the optimiser's state is the suspect"
