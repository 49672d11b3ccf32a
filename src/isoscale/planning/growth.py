"""Which parameter of the base a parameter of the target corresponds to, and which of its extents grow.

Layers of stacks of different lengths are paired by relative depth, among those that hold the same parameters; names
carry no other meaning here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.planning.names import normalise

_STACKS = (nn.ModuleList, nn.Sequential)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by normalised name, shared ones once.

    Raises:
        PlanError: none at all, or weights that are quantised (no rule scales codes).
    """
    found = {normalise(name): parameter for name, parameter in model.named_parameters()}
    if not found:
        raise PlanError("the model has no parameters", key="model")
    for name, parameter in found.items():
        plain = type(parameter.data) in (torch.Tensor, DTensor) or parameter.is_meta or "Fake" in type(parameter.data).__name__
        if not plain or not parameter.is_floating_point():
            raise PlanError(
                f"{name} is quantised ({type(parameter.data).__name__}, {parameter.dtype}): a plan needs the weights that "
                "are trained", key=name, hint="plan first, quantise after",
            )  # fmt: skip
    return found


def _signature(module: nn.Module) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((normalise(name), p.dim()) for name, p in module.named_parameters()))


def _pairs(big: nn.Module, small: nn.Module) -> list[int]:
    """For each child of a stack the index of its partner in the base's stack."""
    wide, narrow = list(big.children()), list(small.children())
    if len(wide) == len(narrow):
        return list(range(len(wide)))
    marks, base_marks = [_signature(child) for child in wide], [_signature(child) for child in narrow]
    out = []
    for i, mark in enumerate(marks):
        same = [j for j, other in enumerate(base_marks) if other == mark] or list(range(len(narrow)))
        at = i / max(1, len(wide) - 1)
        out.append(min(same, key=lambda j: (abs(j / max(1, len(narrow) - 1) - at), j)))
    return out


def partners(model: nn.Module, base: nn.Module) -> dict[str, str]:
    """Target name -> base name, for every parameter.

    Raises:
        PlanError: a parameter that the base lacks, or one whose number of dimensions differs.
    """
    found, small = named(model), named(base)
    if model is base:
        return {name: name for name in found}
    big_modules = {normalise(path): module for path, module in model.named_modules()}
    small_modules = {normalise(path): module for path, module in base.named_modules()}
    known: dict[str, list[int]] = {}
    out = {}
    for name, parameter in found.items():
        path, base_path = "", ""
        for part in name.split("."):
            stack, partner = big_modules.get(path), small_modules.get(base_path)
            mapped = part
            if part.isdigit() and isinstance(stack, _STACKS) and isinstance(partner, _STACKS) and len(partner):
                if path not in known:
                    known[path] = _pairs(stack, partner)
                mapped = str(known[path][int(part)])
            path = f"{path}.{part}" if path else part
            base_path = f"{base_path}.{mapped}" if base_path else mapped
        if base_path not in small:
            raise PlanError(f"the base model has no {base_path}", key=name, value=tuple(parameter.shape),
                            hint=did_you_mean(base_path, small))  # fmt: skip
        if small[base_path].dim() != parameter.dim():
            raise PlanError(
                f"{name} has {parameter.dim()} dimensions, in the base {small[base_path].dim()}", key=name,
                value=(tuple(small[base_path].shape), tuple(parameter.shape)), hint="build both from one class",
            )  # fmt: skip
        out[name] = base_path
    return out


def grows(shape: tuple[int, ...], base: tuple[int, ...], name: str) -> tuple[bool, ...]:
    """For each extent whether it grows from base to target.

    Raises:
        PlanError: an extent shrinks.
    """
    for big, little in zip(shape, base):
        if big < little:
            raise PlanError(f"the base is larger than the target: {name} is {base} there and {shape} here", key=name,
                            hint="base= is where the hyperparameters were tuned, the smaller model")  # fmt: skip
    return tuple(big > little for big, little in zip(shape, base))


def without_width(shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether no parameter grows at all."""
    return all(big == little for big, little in shapes.values())
