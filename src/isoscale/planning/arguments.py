"""What `iso.plan` was given, refused in words where it is of the wrong kind."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from isoscale._base.errors import PlanError
from isoscale.rules import Scale, Table


def check_arguments(
    model: object, parametrisation: object, base: object, target: object, optimizer: object, roles: object,
    clip: object,
) -> None:  # fmt: skip
    """Kinds of the arguments of `iso.plan`.

    Raises:
        PlanError: names the argument, what it got and what it takes.
    """
    if not isinstance(model, nn.Module):
        raise PlanError("the model is no nn.Module", key="model", value=model, hint="build it first; meta is fine")
    if not isinstance(parametrisation, (str, Table)):
        raise PlanError("a parametrisation is a name or a Table", key="parametrisation", value=parametrisation,
                        hint="'complete-d'")  # fmt: skip
    if base is not None and not isinstance(base, (Scale, nn.Module)):
        raise PlanError("base is a Scale or a model", key="base", value=base, hint="base=iso.Scale(width=64, depth=2)")
    if base == Scale():
        raise PlanError("base says nothing", key="base", value=base, hint="base=iso.Scale(width=64, depth=2)")
    if target is not None and not isinstance(target, Scale):
        raise PlanError("target is a Scale", key="target", value=target, hint="target=iso.Scale(batch_tokens=2**18)")
    for side, scale in (("base", base), ("target", target)):
        if isinstance(scale, Scale) and scale.tokens and scale.batch_tokens and scale.batch_tokens > scale.tokens:
            raise PlanError(f"one step of the {side} takes more tokens than its whole run", key=f"{side}.tokens",
                            value=scale.tokens, hint="tokens is the whole run, batch_tokens one step")  # fmt: skip
    if not isinstance(optimizer, str):
        raise PlanError("optimizer is the name of a family", key="optimizer", value=optimizer, hint="'adamw'")
    if roles is not None and not isinstance(roles, Mapping):
        raise PlanError("roles is a dict of pattern to role", key="roles", value=roles,
                        hint='{"*.proj.weight": "hidden"}')  # fmt: skip
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, (int, float)) or not 0 < clip < math.inf):
        raise PlanError("clip is a positive gradient norm", key="clip", value=clip, hint="clip=1.0")
