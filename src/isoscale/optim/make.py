"""The optimiser of a plan: one of torch's or ours, or two where matrices are Muon's or Madam's and the rest AdamW's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.config import OptimSection
from isoscale.optim.lmd import LMD
from isoscale.optim.relatives import Lion, Madam
from isoscale.planning import Plan


class _States:
    """State by parameter, kept by whichever optimiser trains it."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._owner = {p: part for part in parts for group in part.param_groups for p in group["params"]}

    def __getitem__(self, parameter: nn.Parameter) -> Any:
        return self._owner[parameter].state[parameter]

    def get(self, parameter: nn.Parameter, default: Any = None) -> Any:
        owner = self._owner.get(parameter)
        return default if owner is None else owner.state.get(parameter, default)


class Together(torch.optim.Optimizer):
    """Several optimisers that step as one; `param_groups` are theirs, so a schedule that writes LRs there works."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.state = _States(parts)  # type: ignore[assignment]
        self.defaults = {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear every gradient."""
        for part in self.parts:
            part.zero_grad(set_to_none)


def _muon(adjust: str) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    return lambda groups: torch.optim.Muon(groups, adjust_lr_fn=adjust)


_KINDS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, fused=True),
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
    "muon": _muon("original"),
    "muon-rms": _muon("match_rms_adamw"),
    "lion": Lion,
    "madam": Madam,
}


def make_optimizer(
    plan: Plan, model: nn.Module, settings: OptimSection | None = None, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimiser for a plan and its model.

    Args:
        plan: says which family trains what, and at which LR, decay and betas.
        model: the plan's.
        settings: LMD's own (form, state, regulariser, offset, samples), by default the config's defaults.
        seed: of LMD's noise.

    Raises:
        PlanError: nobody here makes one of that family (build your own from `plan.param_groups(model)`).
    """
    if plan.optimizer == "lmd":
        chosen = (settings or OptimSection(name="lmd")).model_dump(exclude={"name"})
        return LMD(plan.param_groups(model), seed=seed, **chosen)
    kinds = list(dict.fromkeys(row.optimizer for row in plan.rows))
    for kind in kinds:
        if kind not in _KINDS:
            hint = f"{did_you_mean(kind, _KINDS)}; or your own class on plan.param_groups(model)"
            raise PlanError(f"no {kind} is built in", key="optimizer", value=kind, hint=hint)
    parts = []
    for kind in kinds:
        groups = plan.param_groups(model, part=kind)
        if groups:
            parts.append(_KINDS[kind](groups))
    return parts[0] if len(parts) == 1 else Together(parts)
