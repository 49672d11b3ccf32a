"""What each parameter of a model is for, its fans, and whether it sits in the depth stack.

isoscale's own modules say their roles (a class attribute, never one on a Parameter). Torch's standard modules are read
by type. Anything else needs a word from the user: `roles={"*.proj.weight": "hidden"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.planning.names import normalise
from isoscale.rules import ROLES

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
_READOUTS = ("head", "lm_head", "readout", "classifier", "fc_out", "output")


@dataclass(frozen=True)
class ParamInfo:
    """What the plan needs to know of one parameter.

    Args:
        name, module_path: normalised names.
        role: see `isoscale.rules.ROLES`.
        shape, fan_in, fan_out: sizes; for vectors both fans are their length.
        in_stack: whether it belongs to the repeated blocks.
    """

    name: str
    module_path: str
    role: str
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    in_stack: bool


def is_own(model: nn.Module) -> bool:
    """Whether the model is made of isoscale's modules, which say their parameters' roles themselves."""
    return any(isinstance(getattr(module, "roles", None), Mapping) for module in model.modules())


def depth_stack(model: nn.Module) -> tuple[str, int]:
    """Path and length of the outermost container of like blocks; ("", 0) when there is none."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            kinds = {type(child) for child in module}
            if len(kinds) == 1 and any(True for _ in module.parameters()) and any(module[0].children()):
                return normalise(path), len(module)
    return "", 0


def _torch_role(module: nn.Module, path: str, local: str) -> str | None:
    if local == "bias":
        return "bias"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, _NORMS):
        return "gain"
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return "readout" if path.rsplit(".", 1)[-1] in _READOUTS else "hidden"
    return None


def _fans(shape: tuple[int, ...], role: str) -> tuple[int, int]:
    if len(shape) < 2:
        return (shape[0] if shape else 1,) * 2
    if role == "embedding":
        return shape[0], shape[1]
    rest = 1
    for extent in shape[2:]:
        rest *= extent
    return shape[1] * rest, shape[0] * rest


def infer(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, ParamInfo]:
    """Name -> info, in the model's order; a parameter shared under two names is listed once.

    Args:
        model: any module, on any device (meta included).
        roles: shell-style patterns on parameter names -> role; they win over what is inferred.

    Raises:
        PlanError: a parameter that no role fits, a pattern that matches nothing, an unknown role, no parameters.
    """
    roles = dict(roles or {})
    for said_role in roles.values():
        if said_role not in ROLES:
            raise PlanError(
                f"unknown role {said_role!r}", key="roles", value=said_role, hint=did_you_mean(said_role, ROLES)
            )
    stack, _ = depth_stack(model)
    modules = {normalise(path): module for path, module in model.named_modules()}
    used: set[str] = set()
    found: dict[str, ParamInfo] = {}
    lost: list[str] = []
    for raw, parameter in model.named_parameters():
        name = normalise(raw)
        path, _, local = name.rpartition(".")
        module = modules[path]
        said = [key for key in roles if fnmatchcase(name, key)]
        used.update(said)
        own: Mapping[str, str] = getattr(module, "roles", {})
        role = roles[said[-1]] if said else own.get(local) or _torch_role(module, path, local)
        if role is None:
            lost.append(f"{name} {tuple(parameter.shape)} of {type(module).__name__}")
            continue
        shape = tuple(parameter.shape)
        fan_in, fan_out = _fans(shape, role)
        inside = bool(stack) and name.startswith(f"{stack}.")
        found[name] = ParamInfo(name, path, role, shape, fan_in, fan_out, inside)
    if lost:
        first = lost[0].split(" ")[0]
        raise PlanError(
            f"no role fits {len(lost)} parameter{'s' if len(lost) > 1 else ''}: {'; '.join(lost[:8])}",
            key="roles", hint=f'say what they are for: roles={{"{first}": "hidden"}} (roles: {", ".join(ROLES)})',
        )  # fmt: skip
    idle = set(roles) - used
    if idle:
        key = sorted(idle)[0]
        raise PlanError(
            f"the pattern {key!r} matches no parameter", key="roles", value=key, hint=did_you_mean(key, found)
        )
    if not found:
        raise PlanError("the model has no parameters", key="model")
    return found
