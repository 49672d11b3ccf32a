"""AdamW for what LMD does not train: torch's own update on groups of another optimiser's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

DEFAULTS: Mapping[str, Any] = {
    "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "foreach": None, "fused": None,
}  # fmt: skip


def adamw_state(p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """What torch's AdamW keeps of a parameter, at the start."""
    step = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else torch.device("cpu"))
    return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def adamw_step(group: Mapping[str, Any], state: Any, gradients: Sequence[Tensor | None], ok: Tensor | None) -> None:
    """One step of torch's AdamW on a group.

    Args:
        group: params and the settings of `DEFAULTS`.
        state: parameter -> its state.
        gradients: one for each parameter; None leaves it alone.
        ok: 0-d; where it is false everything stays as it was. None: it is true.
    """
    held = [(p, g) for p, g in zip(group["params"], gradients) if g is not None]
    lists = [[p for p, _ in held], *([state[p][key] for p, _ in held] for key in ("exp_avg", "exp_avg_sq", "step"))]
    before = [[x.clone() for x in tensors] for tensors in lists] if ok is not None else []
    params, averages, squares, steps = lists
    beta1, beta2 = group["betas"]
    adamw(
        params, [g for _, g in held], averages, squares, [], steps, foreach=group["foreach"], fused=group["fused"],
        amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=False,
    )  # fmt: skip
    if ok is not None:
        for new, old in zip(lists, before):
            for x, y in zip(new, old):
                x.copy_(torch.where(ok.to(x.device), x, y))
