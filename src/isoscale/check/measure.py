"""One cell of the coordinate check: a model at one size and seed, looked at in every one of its few steps."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isoscale._base.errors import ConfigError
from isoscale._base.rng import stream
from isoscale.check.capture import Seen, capture, stacks
from isoscale.check.settings import NONE, CheckSettings
from isoscale.check.subject import Built, Subject
from isoscale.check.task import Task, make_task
from isoscale.planning import normalise, plan

Row = dict[str, Any]
BETAS, EPS = (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class Ready:
    """A model about to be trained."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    task: Task


def rms(value: Tensor) -> float:
    """Root mean square; 0 for an empty tensor, inf where a value is not finite."""
    if not value.numel():
        return 0.0
    found = float(value.detach().double().square().mean().sqrt())
    return found if math.isfinite(found) else math.inf


def _shown(value: float) -> float:
    return float(f"{value:.6g}")


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
    kinds: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    kind = kinds[settings.optimizer]
    if settings.rule == NONE:
        own: dict[str, Any] = {"betas": BETAS, "eps": EPS} if settings.optimizer == "adamw" else {}
        optimizer = kind(model.parameters(), lr=lr, weight_decay=0.0, **own)  # type: ignore[call-arg]
    else:
        base = _fresh(subject, *settings.base, seed).model
        made = plan(model, settings.rule, base=base, hps={"lr": lr}, optimizer=settings.optimizer)
        made.apply(model, seed=seed)
        optimizer = kind(made.param_groups(model), lr=lr)  # type: ignore[call-arg]
    return Ready(model, optimizer, make_task(built, seed, settings.data))


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
    return hashlib.sha256(json.dumps([weights, groups, loss], default=str).encode()).hexdigest()[:16]


class _Record:
    """Collects the numbers of one cell."""

    def __init__(self, ready: Ready) -> None:
        self.ready = ready
        self.names = {normalise(name): p for name, p in ready.model.named_parameters() if p.requires_grad}
        self.first = {name: p.detach().clone() for name, p in self.names.items()}
        self.batch = ready.task.batch(0)
        self.start: dict[str, Seen] = capture(ready.model, ready.task, self.batch)
        self.acts: dict[str, Row] = {name: {"kind": seen.kind, "value": [], "change": []}
                                     for name, seen in self.start.items()}  # fmt: skip
        eps = {p: float(group.get("eps", 0.0)) for group in ready.optimizer.param_groups for p in group["params"]}
        self.params: dict[str, Row] = {name: {"eps": eps.get(p, 0.0), "grad": [], "update": [], "change": 0.0}
                                       for name, p in self.names.items()}  # fmt: skip
        self.look(self.start)

    def look(self, now: dict[str, Seen]) -> None:
        for name, row in self.acts.items():
            seen, before = now.get(name), self.start[name].value
            if seen is None or seen.value.shape != before.shape:  # routed: not the same tensor at every step
                row["value"].append(math.nan)
                row["change"].append(math.nan)
                continue
            row["value"].append(_shown(rms(seen.value)))
            row["change"].append(_shown(rms(seen.value - before)))

    def step(self, index: int) -> float:
        ready = self.ready
        ready.optimizer.zero_grad(set_to_none=True)
        loss = ready.task.loss(ready.model, ready.task.batch(index))
        loss.backward()  # type: ignore[no-untyped-call]
        before = {name: p.detach().clone() for name, p in self.names.items()}
        for name, p in self.names.items():
            self.params[name]["grad"].append(_shown(rms(p.grad)) if p.grad is not None else 0.0)
        ready.optimizer.step()
        for name, p in self.names.items():
            self.params[name]["update"].append(_shown(rms(p.detach() - before[name])))
        self.look(capture(ready.model, ready.task, self.batch))
        return float(loss.detach())


def coordinates(ready: Ready, steps: int) -> Row:
    """Train for `steps` steps; rms values at every step.

    Returns:
        `acts`: name -> kind, value and change since step 0, each of `steps + 1` numbers; `params`: name -> eps,
        gradient and update (`steps` numbers), change of the weight; `loss`; `stacks`: see `capture.stacks`.
    """
    record = _Record(ready)
    losses = [_shown(record.step(index)) for index in range(steps)]
    for name, p in record.names.items():
        record.params[name]["change"] = _shown(rms(p.detach() - record.first[name]))
    return {"acts": record.acts, "params": record.params, "loss": losses, "stacks": stacks(ready.model)}
