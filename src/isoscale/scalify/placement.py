"""Where rescales stand: visible in `print(model)`, movable, each with a statistic and a period.

Norms recalibrate activations on the way forward; nothing recalibrates gradients on the way back. So the paper puts one
rescale of the gradient at the input of each norm (`place_at_norms`): two in a transformer block, where scaling every
operand of every matmul takes 18 (arXiv 2407.17353, section 3).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from isoscale import nn as iso_nn
from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.nn.cast_linear import CastLinear, is_conv1d
from isoscale.scalify.ops import Rescale

_CHILD, _OUTPUT = "rescale", "rescale_output"


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation over features, known by class or by its name."""
    name = type(module).__name__
    known = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))
    return known or name.endswith(("LayerNorm", "RMSNorm", "MXNorm"))


def _before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    step = getattr(module, _CHILD, None)
    if step is None or not args or not isinstance(args[0], Tensor):
        return None
    return (step(args[0]), *args[1:])


def _behind(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    step = getattr(module, _OUTPUT, None)
    return step(out) if step is not None and isinstance(out, Tensor) else None


def place(
    model: nn.Module, path: str, statistic: str = "l2", direction: str = "backward", period: int = 1,
    output: bool = False,
) -> Rescale:  # fmt: skip
    """Put a rescale at a module's input, or its output; one that stands there gives way.

    Args:
        model: that holds the module.
        path: of the module, as in `model.named_modules()`.
        statistic: `l2`, `l1` or `max`.
        direction: `backward` for the gradient of the tensor there, `forward` for the tensor, or `both`.
        period: in calls.
        output: at the module's output; by default at its first input.

    Raises:
        ConfigError: no such module; see `Rescale`.
    """
    modules = dict(model.named_modules())
    if path not in modules:
        raise ConfigError("no such module", key="path", value=path, hint=did_you_mean(path, [p for p in modules if p]))
    module, step = modules[path], Rescale(statistic, direction, period)
    name = _OUTPUT if output else _CHILD
    if not hasattr(module, name):
        _ = module.register_forward_hook(_behind) if output else module.register_forward_pre_hook(_before)
    device = next((p.device for p in module.parameters()), None)
    setattr(module, name, step if device is None else step.to(device))
    return step


def take_away(model: nn.Module, path: str, output: bool = False) -> None:
    """Remove the rescale at a module's input, or its output.

    Raises:
        ConfigError: there is none.
    """
    module = dict(model.named_modules()).get(path)
    name = _OUTPUT if output else _CHILD
    if module is None or getattr(module, name, None) is None:
        raise ConfigError("no rescale stands there", key="path", value=path,
                          hint=did_you_mean(path, list(placements(model))))  # fmt: skip
    setattr(module, name, None)


def placements(model: nn.Module) -> dict[str, Rescale]:
    """Module path -> the rescale at its input; `PATH output` -> the one at its output."""
    out = {}
    for path, module in model.named_modules():
        owner, _, name = path.rpartition(".")
        if isinstance(module, Rescale) and name in (_CHILD, _OUTPUT):
            out[owner if name == _CHILD else f"{owner} output"] = module
    return out


def place_at_norms(model: nn.Module, statistic: str = "l2", period: int = 1) -> list[str]:
    """One rescale of the gradient at the input of every norm; their paths."""
    paths = [path for path, module in model.named_modules() if is_norm(module) and path]
    for path in paths:
        place(model, path, statistic, "backward", period)
    return paths


def place_at_linears(model: nn.Module, statistic: str = "l2", period: int = 1) -> list[str]:
    """Behind the two products of every linear layer: its output, and the gradient of its input; their paths."""
    kinds = (nn.Linear, iso_nn.Linear, CastLinear)
    paths = [path for path, m in model.named_modules() if path and (isinstance(m, kinds) or is_conv1d(m))]
    for path in paths:
        place(model, path, statistic, "backward", period)
        place(model, path, statistic, "forward", period, output=True)
    return paths
