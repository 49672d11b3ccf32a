"""`scalify`: a user's model and optimiser in scaled form, by one call, without touching the mathematics."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from isoscale._base.errors import ConfigError
from isoscale.numerics import convert
from isoscale.scalify.engine import use_scaled_engines
from isoscale.scalify.optimizers import ScaledAdamW, ScaledOptimizer, ScaledSGD
from isoscale.scalify.placement import place_at_linears, place_at_norms
from isoscale.scalify.recipe import ScaleRecipe, recipe_of
from isoscale.scalify.storage import KINDS
from isoscale.scalify.tensor import ScaledTensor, as_scaled

M = TypeVar("M", bound=nn.Module)
_SUPPORTED = "torch.optim.AdamW, Adam and SGD"


def scalify(
    model: M, optimizer: torch.optim.Optimizer | None = None, recipe: str | ScaleRecipe = "fp8-fp16", *,
    seed: int = 0, compile_step: bool = False,
) -> tuple[M, Any]:  # fmt: skip
    """Carry scales through a model and its optimiser.

    The model changes in place: parameters become scaled tensors (under the power of two nearest to their RMS), floating
    buffers take the recipe's dtype where its range holds them, linear layers get their casts, norms their rescales.
    Inputs in floating point are cast on the way in and stand under scale 1. The optimiser is replaced by a scaled one
    with the same groups.

    Args:
        model: any module; trains as before, also under `torch.compile(model)`.
        optimizer: AdamW, Adam or SGD over the model's parameters, before its first step; None for a model alone.
        recipe: a name of `isoscale.scalify.RECIPES`, or a `ScaleRecipe`.
        seed: of stochastic rounding.
        compile_step: the optimiser's step through `torch.compile`.

    Returns:
        The model, and the scaled optimiser (None without one). Make LR schedules on the new one.

    Raises:
        ConfigError: an unknown recipe; a model that is scaled already; an optimiser that has stepped, has a schedule,
            does not hold the model's parameters, or is of another kind.
        PlanError: linear layers that the recipe cannot cast.
    """
    recipe = recipe_of(recipe)
    if any(isinstance(p, ScaledTensor) for p in model.parameters()):
        raise ConfigError("the model is scaled already", key="model", value=type(model).__name__)
    if optimizer is not None:
        _check(optimizer, model)
    dtype = KINDS[recipe.dtype].dtype
    if recipe.linear is not None:
        convert(model, recipe.linear, backend="emulated")
        use_scaled_engines(model)
    if recipe.norm_rescale is not None:
        place_at_norms(model, recipe.norm_rescale, recipe.period)
    if recipe.linear_rescale is not None:
        place_at_linears(model, recipe.linear_rescale, recipe.period)
    originals = {id(p): p.detach() for p in model.parameters()}
    new = _swap(model, dtype, recipe.fallback)
    model.register_forward_pre_hook(_InputCast(dtype), with_kwargs=True)
    if optimizer is None:
        return model, None
    made = _optimizer(optimizer, new, recipe, seed, compile_step)
    if recipe.master:  # from the weights as they were, not from their rounded copies
        for old, p in new.items():
            state = made._new_state(p)
            exact = as_scaled(originals[old].float(), float(p.scale) or None)
            assert isinstance(exact, ScaledTensor)
            state["master"], state["master_scale"] = exact._data, exact._scale
            made.state[p] = state
    return model, made


class _InputCast:
    """Floating-point inputs in the recipe's dtype; a class, so that a model with the hook can be pickled and copied."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def _cast(self, x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != self.dtype:
            return x.to(self.dtype)
        return x

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tuple(self._cast(x) for x in args), {key: self._cast(x) for key, x in kwargs.items()}


def _swap(model: nn.Module, dtype: torch.dtype, fallback: tuple[str, ...]) -> dict[int, ScaledTensor]:
    """Parameters to scaled ones, tied ones to the same; by the id of the old one."""
    new: dict[int, Any] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            if not p.is_floating_point():
                continue
            if id(p) not in new:
                scaled = as_scaled(p.detach(), dtype=dtype, fallback=fallback)
                new[id(p)] = nn.Parameter(scaled, requires_grad=p.requires_grad)
            module._parameters[name] = new[id(p)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point() and not name.endswith(_WIDE):
                module._buffers[name] = _narrowed(name, buffer, dtype)
    return new


_WIDE = ("running_mean", "running_var", "inv_freq")
"""Buffers that stay as they are: statistics, and frequencies that positions multiply."""


def _narrowed(name: str, buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer in the dtype, or as it is, with a warning, where the dtype's range loses values."""
    low = buffer.to(dtype)
    lost = (torch.isinf(low) & torch.isfinite(buffer)) | ((low == 0) & (buffer != 0))
    if not bool(lost.any()):
        return low
    kind = str(dtype).removeprefix("torch.")
    warnings.warn(f"buffer {name!r} keeps its dtype: {kind} cannot hold its values", UserWarning, stacklevel=4)
    return buffer


def _check(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    if isinstance(optimizer, ScaledOptimizer):
        raise ConfigError("the optimiser is scaled already", key="optimizer", value=type(optimizer).__name__)
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        raise ConfigError(
            "no scaled form of this optimiser", key="optimizer", value=type(optimizer).__name__,
            hint=f"{_SUPPORTED} have one; torch's others run on scaled parameters as they are, with foreach=False: "
            "scalify(model) and make them on model.parameters()",
        )  # fmt: skip
    if hasattr(optimizer.step, "_wrapped_by_lr_sched") or hasattr(optimizer, "_with_counter"):
        raise ConfigError("the optimiser has a schedule already", key="optimizer",
                          hint="make the schedule on the optimiser that scalify returns")  # fmt: skip
    if optimizer.state:
        raise ConfigError("the optimiser has stepped already", key="optimizer",
                          hint="scalify before the first step")  # fmt: skip
    known = {id(p) for p in model.parameters()}
    for at, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in known:
                raise ConfigError("the optimiser holds a parameter that the model does not", key=f"param_groups[{at}]",
                                  value=tuple(p.shape))  # fmt: skip
        if group.get("amsgrad"):
            raise ConfigError("no scaled form of amsgrad", key=f"param_groups[{at}].amsgrad", value=True)


_KEPT = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "maximize")
_TORCH_ONLY = ("foreach", "capturable", "differentiable", "fused", "amsgrad", "decoupled_weight_decay")


def _optimizer(
    old: torch.optim.Optimizer, new: dict[int, ScaledTensor], recipe: ScaleRecipe, seed: int, compile_step: bool
) -> ScaledOptimizer:
    """The scaled optimiser with the same groups."""
    groups = []
    for group in old.param_groups:
        kept = {key: value for key, value in group.items() if key not in _TORCH_ONLY and key != "params"}
        if isinstance(old, torch.optim.Adam):
            kept["decoupled"] = bool(group.get("decoupled_weight_decay", isinstance(old, torch.optim.AdamW)))
        groups.append({**kept, "params": [new[id(p)] for p in group["params"]]})
    options: dict[str, Any] = {
        "state": recipe.state, "master": recipe.master, "rescale_grads": recipe.rescale_grads,
        "state_period": recipe.state_period, "stochastic": recipe.stochastic, "seed": seed, "compile": compile_step,
    }  # fmt: skip
    defaults = {key: old.defaults[key] for key in _KEPT if key in old.defaults}
    kind = ScaledSGD if isinstance(old, torch.optim.SGD) else ScaledAdamW
    return kind(groups, **defaults, **options)
