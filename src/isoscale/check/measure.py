"""One cell of the coordinate check: a model at one size and seed, looked at in every one of its few steps."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from isoscale.check.capture import Seen, capture, stacks
from isoscale.check.prepare import Ready
from isoscale.planning import normalise

Row = dict[str, Any]


def rms(value: Tensor) -> float:
    """Root mean square; 0 for an empty tensor, inf where a value is not finite."""
    if not value.numel():
        return 0.0
    found = float(value.detach().double().square().mean().sqrt())
    return found if math.isfinite(found) else math.inf


def _shown(value: float) -> float:
    return float(f"{value:.6g}")


class _Record:
    """Collects the numbers of one cell."""

    def __init__(self, ready: Ready) -> None:
        self.ready = ready
        self.names = {normalise(name): p for name, p in ready.model.named_parameters() if p.requires_grad}
        self.first = {name: p.detach().clone() for name, p in self.names.items()}
        self.batch = ready.task.batch(0)
        self.start: dict[str, Seen] = capture(ready.model, ready.task, self.batch, ready.factors)
        self.acts: dict[str, Row] = {name: {"kind": seen.kind, "value": [], "change": []}
                                     for name, seen in self.start.items()}  # fmt: skip
        groups = ready.optimizer.param_groups
        adam = [group for group in groups if "eps" in group and "betas" in group]  # others mean other things by eps
        eps = {p: float(group["eps"]) for group in adam for p in group["params"]}
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
        self.look(capture(ready.model, ready.task, self.batch, ready.factors))
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
