"""What a sweep's trials say: lines, grids, the transfer error, which hyperparameters matter, the best so far."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Trial = Mapping[str, Any]
Point = tuple[tuple[str, float], ...]
DIVERGED = 1.0  # nats: what a diverged run is above the worst where a number is needed, and the most a transfer costs


def searched(sweep: Mapping[str, Any]) -> list[Trial]:
    """Trials of the search itself that are done."""
    return [t for t in sweep["trials"] if t["state"] == "done" and not t.get("confirm")]


def points(sweep: Mapping[str, Any]) -> dict[Point, float]:
    """Point -> mean loss over its seeds."""
    groups: dict[Point, list[float]] = {}
    for trial in searched(sweep):
        groups.setdefault(tuple(sorted(trial["point"].items())), []).append(float(trial["loss"]))
    return {point: sum(losses) / len(losses) for point, losses in groups.items()}


def lines(sweep: Mapping[str, Any], starts: Mapping[str, float] | None = None) -> dict[str, dict[float, float]]:
    """Name -> value -> mean loss: the LR alone, and every other number that was moved alone, at the LR where most were.

    `starts`: the config's values, which the run at that LR alone had.
    """
    found: dict[tuple[str, float | None], dict[float, float]] = {}
    for point, loss in points(sweep).items():
        at, others = dict(point), [name for name, _ in point if name != "lr"]
        if len(others) <= 1 and point:
            name = others[0] if others else "lr"
            found.setdefault((name, at.get("lr") if others else None), {})[at[name]] = loss
    out: dict[str, dict[float, float]] = {}
    for (name, lr), line in sorted(found.items(), key=lambda pair: len(pair[1])):
        own = found.get(("lr", None), {}).get(lr, None) if lr is not None else None
        known = {} if own is None or name not in (starts or {}) else {(starts or {})[name]: own}
        out[name] = {**known, **line}
    return out


def grids(sweep: Mapping[str, Any]) -> dict[tuple[str, str], tuple[list[float], list[float], NDArray[Any]]]:
    """(row name, column name) -> their values and the losses: pairs that were crossed, the rest as at the best."""
    found = points(sweep)
    best: dict[str, float] = dict(min(found.items(), key=lambda pair: pair[1])[0]) if found else {}
    out = {}
    order = [name for name in sweep.get("search", {}).get("space", best) if name in best]
    for a, b in combinations(order, 2):
        plane = {}
        for point, loss in found.items():
            at = dict(point)
            if at.keys() == best.keys() and all(at[n] == v for n, v in best.items() if n not in (a, b)):
                plane[at[a], at[b]] = loss
        rows, columns = (sorted({at[i] for at in plane}) for i in (0, 1))
        if len(rows) > 1 and len(columns) > 1 and len(plane) == len(rows) * len(columns):
            out[a, b] = rows, columns, np.array([[plane[r, c] for c in columns] for r in rows])
    return out


def transfer_error(loss: NDArray[Any]) -> float:
    """How much is lost by tuning one HP while another is wrong (arXiv 2407.17465, algorithm 1).

    Args:
        loss: [fixed, transferred]; no transfer costs more than one nat, a diverged one that.

    Returns:
        nats: the mean, over wrong values of the fixed one, of the loss at its best value with what was best there.
    """
    finite = loss[np.isfinite(loss)]
    floor = float(finite.min())
    loss = np.where(np.isfinite(loss), loss, float(finite.max()) + DIVERGED)
    row = int(np.unravel_index(int(loss.argmin()), loss.shape)[0])
    others = [r for r in range(loss.shape[0]) if r != row]
    return float(np.mean([min(loss[row, int(loss[r].argmin())] - floor, DIVERGED) for r in others]))


def importance(sweep: Mapping[str, Any], starts: Mapping[str, float]) -> dict[str, float]:
    """Share of each number in what tells the best quarter of the trials from the rest: Optuna's PED-ANOVA.

    Empty for fewer than 20 finished points, or where nothing was drawn.

    Args:
        sweep: `study.json`.
        starts: the config's value of what a point leaves out; 1 where that is a factor.
    """
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution

    found = points(sweep)
    names = sorted({name for point in found for name, _ in point})
    if len(found) < 20 or sweep["search"]["strategy"] in ("lr", "independent", "coordinate"):
        return {}
    octaves = {name: [_octaves(name, dict(p).get(name, starts.get(name, 1.0))) for p in found] for name in names}
    moved = {name: at for name, at in octaves.items() if max(at) > min(at)}
    said: dict[str, BaseDistribution] = {name: FloatDistribution(min(at), max(at)) for name, at in moved.items()}
    worst = max(x for x in found.values() if math.isfinite(x)) + DIVERGED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            study = optuna.create_study()
            for i, loss in enumerate(found.values()):
                params = {name: at[i] for name, at in moved.items()}
                study.add_trial(optuna.trial.create_trial(params=params, distributions=said, value=min(loss, worst)))
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
        finally:
            optuna.logging.set_verbosity(level)


def _octaves(name: str, value: float) -> float:
    return math.log2(1 - value if name in ("beta1", "beta2") else value)


def best_so_far(sweep: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Training FLOPs spent (tokens, where those are not known) and the lowest loss, trial by trial."""
    spent = sweep.get("spent", {})
    tokens = float(spent.get("tokens") or 0)
    price = float(spent.get("flops") or math.nan) / tokens if tokens else math.nan
    at = 0.0
    cost: list[float] = []
    low: list[float] = []
    for trial in sweep["trials"]:
        if trial.get("confirm") or trial["state"] not in ("done", "pruned", "failed"):
            continue
        at += float(trial.get("tokens") or 0) * (price if math.isfinite(price) else 1.0)
        loss = float(trial["loss"]) if trial["state"] == "done" else math.inf
        best = min(loss, low[-1] if low else math.inf)
        cost.append(at)
        low.append(best)
    return cost, low


def contenders(sweep: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The points that were trained again on fresh seeds."""
    sure = sweep.get("confidence") or {}
    return list(sure.get("contenders", ()))
