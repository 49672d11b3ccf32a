"""One trial as a worker gets it, how it is run, and what comes back. Neither torch nor the storage is needed here.

An objective is any function `objective(job, report)` named "module:function"; it returns the loss, or an `Outcome`.
`report(share, loss)` tells the search how far it is; it raises `Pruned` when the trial is not worth finishing.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from isoscale._base.errors import ConfigError, IsoscaleError, NonFiniteError

TRAIN = "isoscale.sweep.one:objective"
LAUNCH = "isoscale.sweep.launch:objective"

Report = Callable[[float, float], None]
"""Share of the trial's tokens, loss there."""


class Pruned(Exception):
    """The search wants this trial to end."""


@dataclass(frozen=True)
class Job:
    """A trial.

    Args:
        id: identity of (point, seed), and the name of its folder.
        point: hyperparameter -> value.
        seed: of init and data.
        config: the trial's own config, JSON.
        folder: where its files go; absolute.
        objective: "module:function".
    """

    id: str
    point: Mapping[str, float]
    seed: int
    config: str
    folder: str
    objective: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "point": dict(self.point)}


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Args:
        loss: what is minimised; inf when it diverged.
        seconds: wall time, all sessions together.
        state: done, pruned or failed.
        diverged: the tensor that was not finite first, else empty.
        error: why it failed, in words.
    """

    loss: float
    seconds: float = 0.0
    state: Literal["done", "pruned", "failed"] = "done"
    diverged: str = ""
    error: str = ""


@dataclass
class Reporter:
    """A `report` that sends and then looks whether the search wants an end.

    Args:
        send: what sends; True: end.
        told: what has been reported, share -> loss.
    """

    send: Callable[[float, float], bool]
    told: dict[float, float] = field(default_factory=dict)

    def __call__(self, share: float, loss: float) -> None:
        """Report.

        Raises:
            Pruned: the trial is not worth finishing.
        """
        self.told[share] = loss
        if self.send(share, loss):
            raise Pruned


def find(objective: str) -> Callable[[Job, Report], float | Outcome]:
    """The function of that name.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = objective.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"no such objective: {error}", key="objective", value=objective,
                          hint="a name that workers can import: 'module:function'") from None  # fmt: skip
    if not callable(found):
        raise ConfigError("an objective is a function", key="objective", value=objective, hint="'module:function'")
    return cast(Callable[[Job, Report], float | Outcome], found)


def execute(job: Job, report: Report) -> Outcome:
    """Run a job; whatever goes wrong in it becomes an outcome, save an interruption."""
    begun = time.perf_counter()

    def ended(state: Literal["pruned", "failed"], error: str = "") -> Outcome:
        return Outcome(math.nan, time.perf_counter() - begun, state, error=error[:2000])

    try:
        found = find(job.objective)(job, report)
    except Pruned:
        return ended("pruned")
    except NonFiniteError as error:
        return Outcome(math.inf, time.perf_counter() - begun, diverged=error.key or "loss")
    except IsoscaleError as error:
        return ended("failed", str(error))
    except Exception as error:
        return ended("failed", f"{type(error).__name__}: {error}")
    if isinstance(found, Outcome):
        return found
    loss = float(found)
    return Outcome(loss if loss == loss else math.inf, time.perf_counter() - begun)
