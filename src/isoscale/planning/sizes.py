"""The sizes that rules are powers of: the model's own, and ratios to where the hyperparameters were tuned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from isoscale._base.errors import PlanError
from isoscale.planning.roles import ParamInfo
from isoscale.rules import Options, Scale

_PARTNERS = {"batch_tokens": "batch", "tokens": "duration"}


def scale_of(model: nn.Module, said: Scale | None, stack: int) -> Scale:
    """The model's scale: what can be read from it, checked against what the user says, and the rest as said.

    Raises:
        PlanError: the user says another width or depth than the model has.
    """
    config = getattr(model, "config", None)
    read = {"width": getattr(config, "width", None), "depth": getattr(config, "depth", None) or stack or None}
    said = said or Scale()
    for name, value in read.items():
        told = getattr(said, name)
        if value is not None and told is not None and told != value:
            raise PlanError(
                f"target says {name} {told}, the model has {value}",
                key=f"target.{name}",
                value=told,
                hint="leave target out: it is read from the model",
            )
    return replace(said, **{name: value for name, value in read.items() if value is not None})


@dataclass(frozen=True)
class Ratios:
    """Target over base, along each axis; 1 where they agree or an axis is switched off.

    `tokens_per_parameter` compares tokens per parameter, for the setting that lets the decay's timescale follow it.
    """

    width: float = 1.0
    depth: float = 1.0
    batch: float = 1.0
    tokens: float = 1.0
    tokens_per_parameter: float = 1.0

    @property
    def of_a_run(self) -> float:
        """m_B / m_D: how much more of the run one step is."""
        return self.batch / self.tokens


def ratios(base: Scale, target: Scale, parameters: float, options: Options) -> Ratios:
    """The ratios of two scales.

    Args:
        base: where the HPs were tuned; a size that both leave open has the ratio 1.
        target: what is trained.
        parameters: parameter count, target over base.
        options: an axis left out of `options.axes` has the ratio 1.

    Raises:
        PlanError: a size that only one side knows, or a base wider or deeper than the target.
    """
    out = {}
    for name, axis in (("width", "width"), ("depth", "depth"), ("batch_tokens", "batch"), ("tokens", "duration")):
        small, big = getattr(base, name), getattr(target, name)
        if name in _PARTNERS and (small is None) != (big is None):
            side, other = ("base", "target") if small is None else ("target", "base")
            raise PlanError(
                f"{other} says {name}, {side} does not, so the {axis} rule has no ratio", key=f"{side}.{name}",
                hint=f"give both, or neither to transfer at equal {axis}",
            )  # fmt: skip
        if name not in _PARTNERS and small is not None and big is not None and small > big:
            raise PlanError(
                f"the base is larger than the target: {name} {small} > {big}", key=f"base.{name}", value=small,
                hint="base= is where the hyperparameters were tuned, the smaller model",
            )  # fmt: skip
        out[axis] = big / small if small and big and axis in options.axes else 1.0
    per_parameter = out["duration"] / parameters if "duration" in options.axes else 1.0
    return Ratios(out["width"], out["depth"], out["batch"], out["duration"], per_parameter)


def sizes_of(info: ParamInfo, base: ParamInfo, shared: Mapping[str, float], options: Options) -> dict[str, float]:
    """Everything a rule may ask of one parameter."""
    fan_in, fan_out = info.fan_in / base.fan_in, info.fan_out / base.fan_out
    if "width" not in options.axes:
        fan_in = fan_out = 1.0
        base = info

    def original(of: ParamInfo) -> float:
        return math.sqrt(max(1.0, of.fan_out / of.fan_in))

    def rms(of: ParamInfo) -> float:
        return math.sqrt(max(of.fan_out, of.fan_in))

    return {
        **shared, "fan_in": info.fan_in, "fan_out": info.fan_out, "fan_in_ratio": fan_in, "fan_out_ratio": fan_out,
        "fan_out_share": min(1.0, info.fan_out / info.fan_in), "fan_out_over_in_ratio": fan_out / fan_in,
        "muon_original_ratio": original(info) / original(base), "muon_rms_ratio": rms(info) / rms(base),
    }  # fmt: skip


def shared_sizes(found: Ratios, stack_depth: int, head: float | None, base_head: float | None) -> dict[str, float]:
    """The sizes that all parameters and sites share."""
    out: dict[str, Any] = {
        "stack_depth": stack_depth, "base_depth": stack_depth / found.depth, "depth_ratio": found.depth,
        "width_ratio": found.width, "batch_ratio": found.batch, "token_ratio": found.tokens,
        "tokens_per_parameter_ratio": found.tokens_per_parameter,
    }  # fmt: skip
    if head:
        out |= {"head_size": head, "head_size_ratio": head / (base_head or head)}
    return out
