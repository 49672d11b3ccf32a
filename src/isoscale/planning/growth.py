"""Which parameter of the base a parameter of the target corresponds to, and which of its extents grow.

Layers of stacks of different lengths are paired by relative depth, among those that hold the same parameters: run by
run where both stacks are the same runs of like layers (the stages of a ResNet), else over the whole stack. Names carry
no other meaning here; a shared parameter is the same one under whichever of its names it is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import torch
from torch import nn

from isoscale._base.errors import PlanError
from isoscale._base.sharded import is_sharded
from isoscale.planning.names import normalise, pattern

_STACKS = (nn.ModuleList, nn.Sequential)
_Signature = tuple[tuple[str, int], ...]


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by normalised name, shared ones once.

    Raises:
        PlanError: none at all, or weights that are quantised (no rule scales codes).
    """
    found = {normalise(name): parameter for name, parameter in model.named_parameters()}
    if not found:
        raise PlanError("the model has no parameters", key="model")
    for name, parameter in found.items():
        kind = type(parameter.data)
        plain = kind is torch.Tensor or is_sharded(parameter) or parameter.is_meta or "Fake" in kind.__name__
        if not plain or not parameter.is_floating_point():
            raise PlanError(
                f"{name} is quantised ({kind.__name__}, {parameter.dtype}): a plan needs the weights that are trained",
                key=name, hint="plan first, quantise after",
            )  # fmt: skip
    return found


def _signature(module: nn.Module) -> _Signature:
    return tuple(sorted((normalise(name), p.dim()) for name, p in module.named_parameters()))


def _nearest(at: float, among: list[int], length: int) -> int:
    """Of some positions in a stack of `length` layers the one at the nearest relative depth."""
    return min(among, key=lambda j: (abs(j / max(1, length - 1) - at), j))


def _runs(marks: list[_Signature]) -> list[tuple[_Signature, list[int]]]:
    groups = groupby(range(len(marks)), key=marks.__getitem__)
    return [(mark, list(members)) for mark, members in groups]


def _pairs(big: nn.Module, small: nn.Module, path: str) -> list[int]:
    """For each child of a stack the index of its partner in the base's stack."""
    wide, narrow = list(big.children()), list(small.children())
    if len(wide) < len(narrow):
        raise PlanError(
            f"the base is larger than the target: {path} has {len(narrow)} layers there and {len(wide)} here", key=path,
            value=len(narrow), hint="base= is where the hyperparameters were tuned",
        )  # fmt: skip
    if len(wide) == len(narrow):
        return list(range(len(wide)))
    marks, base_marks = [_signature(child) for child in wide], [_signature(child) for child in narrow]
    runs, base_runs = _runs(marks), _runs(base_marks)
    if [mark for mark, _ in runs] == [mark for mark, _ in base_runs]:
        return [few[_nearest(k / max(1, len(many) - 1), list(range(len(few))), len(few))]
                for (_, many), (_, few) in zip(runs, base_runs) for k in range(len(many))]  # fmt: skip
    out = []
    for i, mark in enumerate(marks):
        same = [j for j, other in enumerate(base_marks) if other == mark] or list(range(len(narrow)))
        out.append(_nearest(i / max(1, len(wide) - 1), same, len(narrow)))
    return out


def _all_names(model: nn.Module) -> dict[str, nn.Parameter]:
    return {normalise(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}


def partners(model: nn.Module, base: nn.Module) -> dict[str, str]:
    """Target name -> base name, for every parameter.

    Raises:
        PlanError: a parameter that one side lacks or shares differently, one whose number of dimensions differs, a
            base with more layers.
    """
    found, small = named(model), named(base)
    if model is base:
        return {name: name for name in found}
    big_modules = {normalise(path): module for path, module in model.named_modules()}
    small_modules = {normalise(path): module for path, module in base.named_modules()}
    every, base_every = _all_names(model), _all_names(base)
    listed = {id(parameter): name for name, parameter in small.items()}
    known: dict[str, list[int]] = {}
    out = {}
    for name, parameter in found.items():
        path, base_path = "", ""
        for part in name.split("."):
            stack, partner = big_modules.get(path), small_modules.get(base_path)
            mapped = part
            if part.isdigit() and isinstance(stack, _STACKS) and isinstance(partner, _STACKS) and len(partner):
                if path not in known:
                    known[path] = _pairs(stack, partner, path)
                mapped = str(known[path][int(part)])
            path = f"{path}.{part}" if path else part
            base_path = f"{base_path}.{mapped}" if base_path else mapped
        if base_path not in base_every:
            raise _other_structure(f"the base model has no {base_path}", name, tuple(parameter.shape))
        own = listed[id(base_every[base_path])]
        if own != base_path and every.get(own) is not parameter:
            raise _other_structure(f"{base_path} is {own} too in the base, and a tensor of its own here", name)
        if small[own].dim() != parameter.dim():
            raise PlanError(
                f"{name} has {parameter.dim()} dimensions, in the base {small[own].dim()}", key=name,
                value=(tuple(small[own].shape), tuple(parameter.shape)), hint="build both from one class",
            )  # fmt: skip
        out[name] = own
    kinds = {pattern(name) for name in out.values()}
    for name in small:
        if pattern(name) not in kinds:
            raise _other_structure(f"the base model has {name}, and the model has not", name, tuple(small[name].shape))
    return out


def _other_structure(message: str, name: str, shape: tuple[int, ...] | None = None) -> PlanError:
    hint = "build both from one class with the same switches (biases, norms, tying): only sizes may differ"
    return PlanError(message, key=name, value=shape, hint=hint)


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
