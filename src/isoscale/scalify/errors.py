"""What goes wrong with scaled tensors, in words."""

from __future__ import annotations

import math
import traceback
from pathlib import Path

import torch
from torch._ops import OpOverload

from isoscale._base.errors import ConfigError, IsoscaleError
from isoscale.scalify import registry

_OURS = str(Path(__file__).resolve().parent)
_TORCH = str(Path(torch.__file__).resolve().parent)


class RuleError(IsoscaleError):
    """An operator met a scaled tensor and has no scale rule."""


def user_line() -> str:
    """The innermost line of code that is neither torch's nor of this folder: `file:12 in forward: x.foo()`."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((_OURS, _TORCH, "<")):
            return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return ""


def missing_rule(op: OpOverload, writes: bool) -> RuleError:
    """The refusal for an operator without a rule."""
    if writes:
        message = f"{op} writes into a scaled tensor and has no scale rule: on unscaled copies it would do nothing"
        hint = (
            f"write it out of place, register its functional form with @iso.scalify.rule, or work on "
            f"iso.scalify.as_plain(x); {registry.suggestion(op)}"
        )
    elif op.namespace in ("c10d", "_c10d_functional", "fsdp"):
        message = f"{op} knows no scales: on every rank the data stand under another one"
        hint = (
            "iso.scalify.all_reduce(x), reduce_scatter, all_gather; instead of DistributedDataParallel, "
            "iso.scalify.reduce_gradients(model.parameters()) behind backward(); fully_shard the plain model, with "
            "set_custom_reduce_scatter(iso.scalify.ScaledReduceScatter())"
        )
    else:
        message = f"{op} has no scale rule"
        hint = (
            f'register one with @iso.scalify.rule(torch.ops.{op}), run it on iso.scalify.stop_scaling(x), or allow it '
            f'on plain values: scalify(model, optimizer, RECIPES["fp16"].changed(fallback=("{op}",))), or '
            f'as_scaled(x, fallback=("{op}",)); {registry.suggestion(op)}'
        )
    return RuleError(message, key=str(op), place=user_line(), hint=hint)


def wrong_scale(scale: float) -> ConfigError:
    """The refusal of a scale that is no power of two."""
    good = scale > 0 and math.isfinite(scale)
    near = f"the nearest is {2.0 ** round(math.log2(scale)):g}" if good else "such as 0.25, 1 or 8"
    return ConfigError("a scale is a power of two", key="scale", value=scale, hint=near)
