"""The initial values a model brings along: their standard deviation at the base, read rather than asked for.

A sample's standard deviation is noisy, so it is taken for the law it comes from where one of the usual ones fits within
four standard errors (a config's `initializer_range`, 1 / sqrt(fan_in), torch's default, ...); else as measured.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isoscale._base.errors import PlanError
from isoscale._base.sharded import is_sharded
from isoscale.planning.roles import ParamInfo

SMALL = 20_000_000  # parameters: a base of that size is built for real even to plan for a model on the meta device


@dataclass(frozen=True)
class Initial:
    """How a tensor starts: `std` of random values (law says which), or one `constant`, or neither: kept as it is."""

    std: float | None = None
    constant: float | None = None
    law: str = ""


def config_of(model: nn.Module) -> Any:
    """The model's config, as Hugging Face has it, or None."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "to_dict") else None


def laws(fan_in: int, config: Any) -> list[tuple[str, float]]:
    """Standard deviations in use, with their names, the likeliest first."""
    out = []
    spread = getattr(config, "initializer_range", None)
    layers = getattr(config, "num_hidden_layers", None)
    for value in [spread, 0.02]:
        if isinstance(value, float) and value > 0:
            out.append((f"{value:g}", value))
            if layers:
                out.append((f"{value:g} / sqrt(2 x {layers} layers)", value / math.sqrt(2 * layers)))
                out.append((f"{value:g} / sqrt({layers} layers)", value / math.sqrt(layers)))
    out += [("1", 1.0), ("torch's 1 / sqrt(3 fan_in)", (3 * fan_in) ** -0.5), ("1 / sqrt(fan_in)", fan_in**-0.5),
            ("sqrt(2 / fan_in)", (2 / fan_in) ** 0.5)]  # fmt: skip
    return out


def noise(count: int) -> float:
    """Four standard errors of a sample's standard deviation, as a share of it."""
    return 4 / math.sqrt(2 * max(2, count))


@torch.no_grad()
def read(parameter: torch.Tensor, fan_in: int, config: Any) -> Initial:
    """How a real tensor starts."""
    whole = parameter.full_tensor() if is_sharded(parameter) else parameter
    values = whole.detach().float()
    low, high = float(values.min()), float(values.max())
    if low == high:
        return Initial(constant=low)
    mean, std = float(values.mean()), float(values.std())
    if parameter.dim() < 2 or abs(mean) > 0.5 * std:  # no centred random weight: a table like Mamba's A_log
        return Initial()
    std = float(values.square().mean().sqrt())
    rounded = [(f"{value:g}", value) for value in (float(f"{std:.1g}"), float(f"{std:.2g}"))]  # what people write
    for name, law in [*laws(fan_in, config), *rounded]:
        if abs(std / law - 1) < min(0.25, noise(values.numel())):
            return Initial(std=law, law=name)
    return Initial(std=std, law="as measured")


def _by_type(module: nn.Module, info: ParamInfo, config: Any) -> Initial:
    """How a tensor on the meta device will start, by what its module is."""
    if info.role in ("gain", "final_norm", "finite", "bias") or len(info.shape) < 2:
        ones = info.role in ("gain", "final_norm") and not info.name.endswith("bias")
        return Initial(constant=1.0 if ones else 0.0) if info.role != "vector" else Initial()
    spread = getattr(config, "initializer_range", None)
    if isinstance(spread, float):
        return Initial(std=spread, law="initializer_range, assumed: the model is on the meta device")
    if type(module) is nn.Embedding:
        return Initial(std=1.0, law="torch's default for an embedding, assumed")
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return Initial(std=(3 * info.fan_in) ** -0.5, law="torch's default, assumed")
    raise PlanError(
        f"the base is on the meta device, so the initial scale of {info.name} ({type(module).__name__}) is not known",
        key="base", hint="build the base for real, it is small; or say hps={'init_std': 0.02}",
    )  # fmt: skip


def real_base(base: nn.Module, target: nn.Module) -> nn.Module:
    """The base with values: itself, or built anew from its config where that is cheap or the target has values too."""
    config = config_of(base)
    if config is None or not any(p.is_meta for p in base.parameters()):
        return base
    if sum(p.numel() for p in base.parameters()) > SMALL and any(p.is_meta for p in target.parameters()):
        return base
    with torch.random.fork_rng(devices=[]):
        made: nn.Module = type(base)(copy.deepcopy(config))
    return made


def initial(info: ParamInfo, parameter: torch.Tensor, module: nn.Module, config: Any) -> Initial:
    """How one of the base's parameters starts.

    Args:
        info: the parameter at the base.
        parameter: it.
        module: its owner.
        config: of the base, or None.

    Raises:
        PlanError: it is on the meta device and nothing says how it will start.
    """
    if parameter.is_meta:
        return _by_type(module, info, config)
    return read(parameter, info.fan_in, config)
