"""The role of every parameter of a model that says nothing itself: from what the forward does with it and what grows.

Names, classes and the order of modules are not looked at. A matrix is hidden, input or readout by which of its sides
grow; a vector is a gain, a bias or another vector by how it meets the activations; where nothing grows it is finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod

from torch import nn

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.planning.growth import grows, named, partners
from isoscale.planning.roles import ParamInfo
from isoscale.planning.trace import Trace, Use, trace
from isoscale.rules import ROLES


def _matrix_role(use: Use, up: Sequence[bool], name: str, readouts: Mapping[str, object]) -> str:
    if use.contracted is None:
        if not any(up):
            return "hidden"
        raise PlanError(
            f"{name} is a matrix whose fan-in is not clear: it is multiplied along different sides", key=name,
            hint=_tag(name),
        )  # fmt: skip
    inward = any(up[dim] for dim in use.contracted)
    outward = any(grown for dim, grown in enumerate(up) if dim not in use.contracted)
    if not any(up) and name in readouts:  # base = target: nothing grows, and nothing depends on the answer
        return "readout"
    if inward and not outward:
        if not use.inside:
            return "readout"
        return "router" if use.routes else "hidden"  # a key projection for a fixed number of groups is hidden
    return "input" if outward and not inward else "hidden"


def _tag(name: str) -> str:
    return f'say what it is for: roles={{"{name}": "hidden"}} (roles: {", ".join(ROLES)})'


def _role(name: str, use: Use, up: Sequence[bool], trace_: Trace, identity: bool) -> str:
    if "lookup" in use.kinds:
        return "embedding"
    if use.kinds & {"matmul", "conv"}:
        return _matrix_role(use, up, name, trace_.feeds)
    if use.bent and any(up):
        raise PlanError(
            f"{name} is a weight that goes through something nonlinear before its matmul: no rule knows its scale",
            key=name, hint=_tag(name),
        )  # fmt: skip
    if not any(up) and not (identity and len(up) == 1 and use.normalised):
        return "finite"
    if use.normalised and use.after:
        return "final_norm"
    if sum(up) > 1 and ("other" in use.kinds or ("gain" in use.kinds and not use.normalised)):
        raise PlanError(
            f"{name} grows along {sum(up)} of its {len(up)} dimensions and is in an operation that no rule knows",
            key=name, hint=_tag(name),
        )  # fmt: skip
    if use.kinds == {"shift"}:
        return "bias" if len(up) == 1 else "embedding"  # a table added to the stream: positions, a class token
    if "gain" in use.kinds and use.normalised:
        return "gain"
    return "vector"


def _fans(shape: tuple[int, ...], use: Use | None, role: str) -> tuple[int, int]:
    if role == "embedding" and len(shape) > 1:
        return prod(shape[:-1]), shape[-1]
    if len(shape) < 2:
        return (shape[0] if shape else 1,) * 2
    if use is None or use.contracted is None:
        return prod(shape[1:]), shape[0]
    fan_in = prod(shape[dim] for dim in use.contracted)
    rest = [extent for dim, extent in enumerate(shape) if dim not in use.contracted]
    experts = len(shape) == 3 and len(use.contracted) == 1 and "conv" not in use.kinds
    return fan_in, rest[-1] if experts else prod(rest)


def _said(roles: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    for role in roles.values():
        if role not in ROLES:
            raise PlanError(f"unknown role {role!r}", key="roles", value=role, hint=did_you_mean(role, ROLES))
    out = {}
    for pattern, role in roles.items():
        hit = [name for name in names if fnmatchcase(name, pattern)]
        if not hit:
            raise PlanError(f"the pattern {pattern!r} matches no parameter", key="roles", value=pattern,
                            hint=did_you_mean(pattern, names))  # fmt: skip
        out.update(dict.fromkeys(hit, role))
    return out


def foreign_infos(
    model: nn.Module, base: nn.Module, pairs: Mapping[str, str], seen: Trace,
    roles: Mapping[str, str] | None = None,
) -> tuple[dict[str, ParamInfo], dict[str, ParamInfo]]:
    """What each parameter is for, in the target and (under the target's name) in the base. `pairs`: see `partners`.

    Raises:
        PlanError: tensors whose role is not clear (all of them are named), patterns or models that do not fit.
    """
    found, small = named(model), named(base)
    said = _said(roles or {}, list(found))
    infos, base_infos, lost = {}, {}, []
    identity = all(found[name].shape == small[other].shape for name, other in pairs.items())
    for name, parameter in found.items():
        shape, little = tuple(parameter.shape), tuple(small[pairs[name]].shape)
        use = seen.uses.get(name)
        up = grows(shape, little, name)
        if name in said:
            role = said[name]
        elif use is None:
            lost.append(f"{name} {shape}")
            continue
        else:
            role = _role(name, use, up, seen, identity)
        path = name.rpartition(".")[0]
        inside = use is not None and use.inside
        infos[name] = ParamInfo(name, path, role, shape, *_fans(shape, use, role), inside)
        base_infos[name] = ParamInfo(pairs[name], path, role, little, *_fans(little, use, role), inside)
    if lost:
        raise PlanError(
            f"the forward never used {len(lost)} parameter{'s' if len(lost) > 1 else ''}: {'; '.join(lost[:8])}",
            key=lost[0].split(" ")[0], hint=f"an example= that reaches them, or {_tag(lost[0].split(' ')[0])}",
        )  # fmt: skip
    return infos, base_infos


def infer_roles(
    model: nn.Module, base_model: nn.Module, roles: Mapping[str, str] | None = None, example: object = None
) -> dict[str, str]:
    """The role of every parameter of any model, by name.

    Args:
        model: the target, real or meta.
        base_model: the same class at another width; which extents grow is read off the two.
        roles: pattern -> role, where you know better.
        example: input of the forward, where it cannot be guessed.

    Raises:
        PlanError: nothing differs between the two, or tensors whose role is not clear.
    """
    pairs = partners(model, base_model)
    infos, base = foreign_infos(model, base_model, pairs, trace(model, example), roles)
    if all(info.shape == base[name].shape for name, info in infos.items()):
        raise PlanError("nothing differs between base and target: no extent says what grows with width", key="base",
                        hint="build the base with a smaller width")  # fmt: skip
    return {name: info.role for name, info in infos.items()}
