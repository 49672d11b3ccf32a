"""A model about to be trained: built, initialised and given its optimiser as the rule says."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from isoscale._base.errors import ConfigError
from isoscale._base.rng import stream
from isoscale.check.settings import NONE, CheckSettings
from isoscale.check.subject import Built, Subject
from isoscale.check.task import Task, make_task
from isoscale.models import Decoder
from isoscale.optim import make_optimizer
from isoscale.planning import plan

BETAS, EPS = (0.9, 0.95), 1e-8
MEASURE = 1  # raise it when what is measured changes, so that old rows are not used again
_NOT_INSIDE = ("embedding", "readout", "router")


@dataclass(frozen=True)
class Ready:
    """What a run starts from.

    Args:
        model: initialised.
        optimizer: with the rule's groups.
        task: batches and loss.
        factors: module path -> the forward multiplier that its weights hold, where a rule put one there.
        notes: what the plan says of its own limits.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    task: Task
    factors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _still(model: nn.Module) -> None:
    """Dropout off; batch norms keep the statistics of the batch."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()


def _fresh(subject: Subject, width: int, depth: int, seed: int) -> Built:
    torch.manual_seed(stream(seed, "check", "init"))
    built = subject.build(width, depth)
    if not any(parameter.requires_grad for parameter in built.model.parameters()):
        raise ConfigError("the model has nothing to train", key="TARGET", value=subject.name)
    return built


def prepare(subject: Subject, settings: CheckSettings, width: int, depth: int, seed: int, lr: float) -> Ready:
    """Build, initialise, and make the optimiser as the rule says.

    Without a rule the model's own init is kept, and all tensors get one LR, unless the model has a method
    `param_groups(lr)`, which gives torch's optimiser groups.

    Args:
        subject: what to build.
        settings: rule, base, optimiser and data.
        width: of the model.
        depth: of the model.
        seed: of init and data.
        lr: in base units.

    Raises:
        ConfigError: the model cannot be built, or trained without more being said.
        PlanError: the rule does not fit the model.
    """
    built = _fresh(subject, width, depth, seed)
    model = built.model
    _still(model)
    task = make_task(built, seed, settings.data)
    if settings.rule == NONE:
        told = getattr(model, "param_groups", None)
        return Ready(model, _bare(settings.optimizer, told(lr) if callable(told) else model.parameters(), lr), task)
    base = model if (width, depth) == settings.base else _fresh(subject, *settings.base, seed).model
    # LMD's noise, a share of every weight, would hide what a few steps change
    said: dict[str, Any] = {"base": base, "hps": {"lr": lr, "sigma": 1e-4}, "optimizer": settings.optimizer}
    said["example"] = built.example if built.loss is None else _inputs(model, task)
    factors: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plan's notes say the same
        if not isinstance(model, Decoder):
            rows = plan(model, settings.rule, absorb=False, **said).rows
            factors = {row.name.rpartition(".")[0]: row.hook for row in rows
                       if row.hook != 1 and row.role not in _NOT_INSIDE}  # fmt: skip
        made = plan(model, settings.rule, **said)
    made.apply(model, seed=seed)
    return Ready(model, make_optimizer(made, model), task, factors, made.notes)


def _bare(name: str, groups: Any, lr: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)


def _inputs(model: nn.Module, task: Task) -> Any:
    """What the task's loss calls the model with."""
    seen: list[dict[str, Any]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            task.loss(model, task.batch(0))
    finally:
        handle.remove()
    return seen[0] if seen else None


def fingerprint(ready: Ready) -> str:
    """A hash of what a cell starts from: weights, optimiser settings, loss of the first batch.

    A finished cell is used again only if this is unchanged, so an edit of the model, its init or its rule runs anew.
    """
    weights = [[name, list(p.shape), float(p.detach().double().sum()), float(p.detach().double().abs().sum())]
               for name, p in ready.model.named_parameters()]  # fmt: skip
    names = {parameter: name for name, parameter in ready.model.named_parameters()}
    groups = [[{key: value for key, value in group.items() if key != "params"}, [names[p] for p in group["params"]]]
              for group in ready.optimizer.param_groups]  # fmt: skip
    with torch.no_grad():
        loss = float(ready.task.loss(ready.model, ready.task.batch(0)))
    start = json.dumps([MEASURE, weights, groups, dict(ready.factors), loss], default=str)
    return hashlib.sha256(start.encode()).hexdigest()[:16]
