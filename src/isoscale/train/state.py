"""Everything that must survive a restart, and how it becomes named tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isoscale._base.errors import CheckpointError
from isoscale.optim import LMD
from isoscale.planning import normalise


@dataclass
class Progress:
    """Where a run is. Random streams need no state: each is a function of (seed, name, step).

    Args:
        step: optimiser steps done (skipped ones included).
        skipped: steps whose update was left out for a non-finite loss or gradient.
        in_a_row: how many of them just now.
        clipped: steps whose gradient norm was cut.
        evaluated: the last step whose evaluation is complete in the metric rows.
        seconds: wall time over all sessions of the run.
    """

    step: int = 0
    skipped: int = 0
    in_a_row: int = 0
    clipped: int = 0
    evaluated: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `parameter name:key` -> tensor."""
    out: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            out[f"{normalise(name)}:{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return out


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put saved state back, dtypes untouched; LMD's parameters get the sample that it says they hold.

    Raises:
        CheckpointError: a tensor belongs to no parameter of the model.
    """
    parameters = {normalise(name): parameter for name, parameter in model.named_parameters()}
    for full, value in tensors.items():
        name, _, key = full.rpartition(":")
        if name not in parameters:
            raise CheckpointError("the checkpoint's optimiser state is of another model", key=name)
        parameter = parameters[name]
        place = value.to(parameter.device) if value.dim() else value  # counters stay on the CPU
        optimizer.state[parameter][key] = place.clone()
    if isinstance(optimizer, LMD):
        optimizer.redraw()
