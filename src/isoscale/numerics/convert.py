"""Swap a model's linear layers for cast ones, by plan rows or by a recipe alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from isoscale import nn as iso_nn
from isoscale._base.errors import PlanError
from isoscale.formats import cast_stats as tensor_stats
from isoscale.formats.recipes import LayerFormats, Recipe, recipe_by_name
from isoscale.nn.cast_linear import CastLinear, Recorder, is_conv1d
from isoscale.numerics.backend import BACKENDS, pick_backend
from isoscale.numerics.linear import Linear
from isoscale.numerics.norms import Takeover
from isoscale.planning import Plan, normalise

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Summary:
    """What was converted.

    Args:
        backend: `emulated`, `scaled_mm`, both, or `none` when nothing is cast.
        layers: module path -> formats.
    """

    backend: str
    layers: dict[str, LayerFormats]


def convert(
    model: M, recipe: str | Recipe, *, plan: Plan | None = None, norm: str | None = None, backend: str = "auto",
    example: object = None, norm_skip: Sequence[str] = (),
) -> M:  # fmt: skip
    """Cast the operands of the model's linear layers; in place, Parameters and names unchanged.

    Args:
        model: any module with `isoscale.nn.Linear`, `torch.nn.Linear` or Hugging Face `Conv1D` leaves.
        recipe: a name or a recipe of your own.
        plan: take each layer's formats from its row (the same recipe put them there; without a plan it gives the same).
        norm: None: as the recipe says. `none` leaves norms as they are. `mxnorm` makes every RMSNorm and the
            block-scaled linear layers behind it one `MXNormLinear` each (arXiv 2603.13180); pairs are found by running
            the model once. The final norm and the head stay. `mxnorm-fine`, `mxnorm-p1`, `mxnorm-ride`: settings of
            `isoscale.nn.MXNormLinear`; `mxnorm-rounded` is unstable.
        backend: `auto` (hardware for each layer whose formats and sizes it can run, else emulated), `emulated` (any
            format, any size) or `scaled_mm`.
        example: with a norm: input of one forward (a tensor, a tuple or a dict); None to guess.
        norm_skip: with a norm: patterns of norms to leave as they are, or one pattern.

    Raises:
        ConfigError: unknown recipe, norm or backend; hardware asked for that a layer cannot use.
        PlanError: no module; no linear layer that the recipe casts; one without features; a plan of another recipe; a
            second conversion; a norm before block-scaled layers that cannot be taken over, by name and with the reason.
    """
    if not isinstance(model, nn.Module):
        raise PlanError("only a module can be converted", key="model", value=type(model).__name__)
    recipe = recipe if isinstance(recipe, Recipe) else recipe_by_name(recipe)
    recipe = recipe if norm is None else recipe.changed(norm=norm)
    norm = recipe.norm
    if backend not in BACKENDS:
        pick_backend(backend, torch.device("cpu"))  # refuses
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
    leaves = [(path, module) for path, module in model.named_modules() if _castable(module)]
    if not leaves:
        raise PlanError("the model has no linear layer to cast", key="model", value=type(model).__name__)
    assignment = recipe.on(normalise(path) for path, _ in model.named_modules())

    def formats_of(path: str) -> LayerFormats:
        name = normalise(path)
        if plan is not None and getattr(model.get_submodule(path), "weight", None) is not None:
            return plan.row(f"{name}.weight").formats
        return assignment.formats(name)

    taken = None if norm == "none" else Takeover(model, norm, formats_of, example, norm_skip)
    made: list[tuple[str, str, CastLinear]] = []
    for path, module in leaves:
        name, formats = normalise(path), formats_of(path)
        if not formats.casts:
            continue
        parent, _, leaf = path.rpartition(".")
        if not leaf:
            raise PlanError(
                "a lone linear layer cannot be swapped in place",
                key="model",
                hint="put it into a module: torch.nn.Sequential(layer)",
            )
        features = _features(module)
        if 0 in features:
            raise PlanError("a layer without features cannot be cast", key=name, value=features)
        found = pick_backend(backend, device, formats, features, name)
        layer = CastLinear(module, formats, found) if taken is None else taken.layer(path, module, formats, found)
        made.append((parent, leaf, layer.train(module.training)))
    if not made and plan is None:
        patterns = tuple(pattern for names, _ in recipe.layers for pattern in names)
        hint = "patterns: " + ", ".join(patterns)
        raise PlanError(f"the recipe {recipe.name!r} casts no layer of this model", key="recipe", hint=hint)
    for parent, leaf, layer in made:  # only now: a refusal leaves the model as it was
        setattr(model.get_submodule(parent), leaf, layer)
    if taken is not None:
        taken.place()
    return model


def _castable(module: nn.Module) -> bool:
    """Whether it is a linear layer without formats of its own."""
    linear = isinstance(module, nn.Linear | iso_nn.Linear) or is_conv1d(module)
    return linear and not isinstance(module, Linear)


def _features(module: Any) -> tuple[int, int]:
    """Sizes in and out."""
    if is_conv1d(module):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)


def switch(model: M, to: LayerFormats | Recipe | str, backend: str = "auto") -> M:
    """Give the cast layers of a converted model other formats, in place; Parameters and names unchanged.

    For the last stretch of a run in higher precision (`Recipe.finish_step`), or to look at one model in several
    recipes. Compiled code notices, and compiles again.

    Args:
        model: a converted model; layers that were not cast stay as they are.
        to: formats for all of them, or a recipe (`bf16` for a finish).
        backend: as for `convert`.

    Raises:
        ConfigError: unknown recipe or backend; hardware asked for that a layer cannot use.
        PlanError: nothing is cast in this model.
    """
    if isinstance(to, str):
        to = recipe_by_name(to)
    layers = [(normalise(path), module) for path, module in model.named_modules() if isinstance(module, CastLinear)]
    if not layers:
        raise PlanError("the model has no cast layers", key="model", value=type(model).__name__,
                        hint="isoscale.numerics.convert(model, recipe) first")  # fmt: skip
    if isinstance(to, LayerFormats):
        to = Recipe("one for all", ((("*",), to),), "formats given by hand")
    assignment = to.on(normalise(path) for path, _ in model.named_modules())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    made = []
    for name, layer in layers:
        formats = assignment.formats(name)
        made.append((layer, formats, pick_backend(backend, device, formats, layer.features, name)))
    for layer, formats, found in made:  # only now: a refusal leaves the model as it was
        layer.recast(formats, found)
    return model


def summary(model: nn.Module) -> Summary:
    """Which layers of a model are cast, to what, and who runs them."""
    cast = {normalise(path): module for path, module in model.named_modules() if isinstance(module, CastLinear)}
    used = sorted({module.backend for module in cast.values()}, reverse=True)
    return Summary(" and ".join(used) or "none", {path: module.formats for path, module in cast.items()})


def cast_stats(model: nn.Module, loss: Callable[[], Tensor]) -> list[dict[str, Any]]:
    """Clipped and flushed share of every cast in one forward and backward pass.

    Args:
        model: a converted model; its gradients are cleared.
        loss: runs the forward and returns the scalar loss.

    Returns:
        One row per (layer, operand), as `CastLinear.casts` names them: `layer`, `operand`, `format`, `axis` of the
        blocks, `clipped`, `flushed`, `rms`. None for a model that casts nothing.
    """
    rows: list[dict[str, Any]] = []
    cast = [(normalise(path), module) for path, module in model.named_modules() if isinstance(module, CastLinear)]
    if not cast:
        return rows

    def recorder(path: str) -> Recorder:
        def record(operand: str, fmt: str, tensor: Tensor, axis: int) -> None:
            value = tensor.detach()
            clipped, flushed = tensor_stats(value, fmt, axis=axis)
            rows.append({"layer": path, "operand": operand, "format": fmt, "axis": axis, "clipped": float(clipped),
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
