"""Swap a model's linear layers for cast ones, by plan rows or by a recipe alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from isoscale import nn as iso_nn
from isoscale._base.errors import PlanError
from isoscale.formats import by_name
from isoscale.formats import cast_stats as tensor_stats
from isoscale.formats.recipes import LayerFormats, Recipe, recipe_by_name
from isoscale.numerics.backend import pick_backend
from isoscale.numerics.cast_linear import CastLinear
from isoscale.planning import Plan, normalise

M = TypeVar("M", bound=nn.Module)
_LINEARS = (nn.Linear, iso_nn.Linear)


@dataclass(frozen=True)
class Summary:
    """What was converted.

    Args:
        backend: `emulated`, `scaled_mm`, or `none` when nothing is cast.
        layers: module path -> formats.
    """

    backend: str
    layers: dict[str, LayerFormats]


def convert(model: M, recipe: str | Recipe, *, plan: Plan | None = None, backend: str = "auto") -> M:
    """Cast the operands of the model's linear layers; in place, Parameters and names unchanged.

    Args:
        model: any module with `isoscale.nn.Linear` or `torch.nn.Linear` leaves.
        recipe: a name or a recipe of your own.
        plan: take each layer's formats from its row (they were put there by the same recipe).
        backend: `auto`, `emulated` or `scaled_mm`.

    Raises:
        ConfigError: unknown recipe or backend, or FP8 hardware asked for and missing.
        PlanError: no linear layer to cast; a plan of another recipe; a second conversion.
    """
    recipe = recipe_by_name(recipe) if isinstance(recipe, str) else recipe
    if not recipe.layers:
        return model
    if plan is not None and plan.recipe != recipe.name:
        raise PlanError(
            f"the plan was made for the recipe {plan.recipe!r}",
            key="recipe",
            value=recipe.name,
            hint=f"iso.plan(model, ..., recipe={recipe.name!r})",
        )
    if any(isinstance(module, CastLinear) for module in model.modules()):
        raise PlanError("the model is converted already", key="model", hint="convert a fresh model")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    chosen = pick_backend(backend, device)
    leaves = [(path, module) for path, module in model.named_modules() if isinstance(module, _LINEARS)]
    if not leaves:
        raise PlanError("the model has no linear layer to cast", key="model", value=type(model).__name__)
    for path, module in leaves:
        name = normalise(path)
        if plan is not None and getattr(module, "weight", None) is not None:
            formats = plan.row(f"{name}.weight").formats
        else:
            formats = recipe.formats(name)
        if not formats.casts:
            continue
        parent, _, leaf = path.rpartition(".")
        if not leaf:
            raise PlanError(
                "a lone linear layer cannot be swapped in place",
                key="model",
                hint="put it into a module: torch.nn.Sequential(layer)",
            )
        setattr(model.get_submodule(parent), leaf, CastLinear(module, formats, chosen))
    return model


def summary(model: nn.Module) -> Summary:
    """Which layers of a model are cast, to what, and who runs them."""
    cast = {normalise(path): module for path, module in model.named_modules() if isinstance(module, CastLinear)}
    backend = next((module.backend for module in cast.values()), "none")
    return Summary(backend, {path: module.formats for path, module in cast.items()})


def cast_stats(model: nn.Module, loss: Callable[[], Tensor]) -> list[dict[str, Any]]:
    """Clipped and flushed share of every cast in one forward and backward pass.

    Args:
        model: a converted model; its gradients are cleared.
        loss: runs the forward and returns the scalar loss.

    Returns:
        One row per (layer, operand): `layer`, `operand`, `format`, `clipped`, `flushed`, `rms`.
    """
    rows: list[dict[str, Any]] = []
    cast = [(normalise(path), module) for path, module in model.named_modules() if isinstance(module, CastLinear)]

    def recorder(path: str) -> Callable[[str, str, Tensor], None]:
        def record(operand: str, fmt: str, tensor: Tensor) -> None:
            value = tensor.detach()
            if fmt == "fp32":
                return
            clipped, flushed = tensor_stats(value, by_name(fmt))
            rows.append({"layer": path, "operand": operand, "format": fmt, "clipped": float(clipped),
                         "flushed": float(flushed), "rms": float(value.float().square().mean().sqrt())})  # fmt: skip

        return record

    for path, module in cast:
        module.recorder = recorder(path)
    try:
        model.zero_grad(set_to_none=True)
        loss().backward()  # type: ignore[no-untyped-call]
    finally:
        for _, module in cast:
            module.recorder = None
        model.zero_grad(set_to_none=True)
    return rows
