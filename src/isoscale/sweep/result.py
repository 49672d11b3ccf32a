"""What a sweep found, read back from its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isoscale._base.errors import CheckpointError
from isoscale._base.files import read_json
from isoscale.config import RunConfig
from isoscale.config.hps import parse_key
from isoscale.sweep.winner import Confidence, choose
from isoscale.train.folder import read_config

FORMAT = 2  # of study.json and the storage; 1 was sweep.json with Optuna's own queue


@dataclass(frozen=True)
class TrialRow:
    """One (point, seed).

    Args:
        id: its identity and folder name under `trials/`.
        point: HP values in base units.
        seed: of init and data.
        state: done, pruned, running, waiting or failed.
        loss: validation, nats per token; inf when diverged, nan while open; pruned: its last training loss.
        seconds: wall time.
        attempts: how often it was started.
        tokens: trained on.
        error: why it failed.
        diverged: what was not finite first.
        confirm: one of the fresh-seed runs after the search.
    """

    id: str
    point: Mapping[str, float]
    seed: int
    state: str
    loss: float
    seconds: float
    attempts: int
    tokens: int = 0
    error: str = ""
    diverged: str = ""
    confirm: bool = False


@dataclass(frozen=True)
class SweepResult:
    """A sweep's trials and its winner.

    Args:
        out: the sweep folder.
        config: what every trial shared.
        trials: one per (point, seed).
        best: the winning HP values; what is left out keeps the config's value.
        loss: their mean validation loss over the seeds, nan while nothing is done; over the fresh seeds where the
            winner was confirmed.
        edge: whether the best LR lies at an end of what was tried (then the optimum may lie outside).
        seconds: wall time of all trials together.
        confidence: what the fresh seeds say; None without confirmation.
        stopped: what ended the search early (`sweep.budget_runs`, `sweep.enough`, ...), else empty.
        warnings: in words.
    """

    out: Path
    config: RunConfig
    trials: tuple[TrialRow, ...]
    best: Mapping[str, float]
    loss: float
    edge: bool
    seconds: float
    confidence: Confidence | None = None
    stopped: str = ""
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "out": str(self.out), "best": dict(self.best), "loss": self.loss, "edge": self.edge,
            "seconds": self.seconds, "confidence": self.confidence.to_dict() if self.confidence else None,
            "stopped": self.stopped, "warnings": list(self.warnings),
            "trials": [asdict(trial) for trial in self.trials],
        }  # fmt: skip


def best_toml(result: SweepResult) -> str:
    """The winner's values alone, as a layer that any command takes as `--config`."""
    lines = [f"# {result.config.name}: loss {result.loss:.6g}"]
    for title, factors in (("hps", False), ("modules", True)):
        chosen = {name: value for name, value in result.best.items() if (parse_key(name) is not None) == factors}
        if chosen:
            lines += ["", f"[{title}]", *(f"{json.dumps(name) if factors else name} = {value!r}" for name, value in
                                          chosen.items())]  # fmt: skip
    return "\n".join(lines) + "\n"


def means(trials: Sequence[TrialRow]) -> list[tuple[Mapping[str, float], float]]:
    """Finished points and their mean loss over the seeds that are done; confirmations are left out."""
    groups: dict[tuple[tuple[str, float], ...], tuple[Mapping[str, float], list[float]]] = {}
    for trial in trials:
        if trial.state == "done" and not trial.confirm:
            groups.setdefault(tuple(sorted(trial.point.items())), (trial.point, []))[1].append(trial.loss)
    return [(dict(point), sum(losses) / len(losses)) for point, losses in groups.values()]


def confirmed(trials: Sequence[TrialRow]) -> Confidence | None:
    """What the fresh seeds say; None where there are none."""
    groups: dict[tuple[tuple[str, float], ...], tuple[Mapping[str, float], dict[int, float]]] = {}
    for trial in trials:
        if trial.confirm and trial.state == "done":
            groups.setdefault(tuple(sorted(trial.point.items())), (trial.point, {}))[1][trial.seed] = trial.loss
    return choose(list(groups.values())) if groups else None


def summarise(
    out: Path, config: RunConfig, trials: tuple[TrialRow, ...], stopped: str = "", warnings: tuple[str, ...] = ()
) -> SweepResult:
    """The result as it stands."""
    finished, sure = means(trials), confirmed(trials)
    done = [(point, loss) for point, loss in finished if math.isfinite(loss)]
    best, loss = min(done, key=lambda pair: pair[1]) if done else ({}, math.nan)
    if sure is not None and math.isfinite(sure.contenders[0].interval.mean):
        best, loss = sure.contenders[0].point, sure.contenders[0].interval.mean
    rates = sorted({point["lr"] for point, _ in finished if "lr" in point})
    lines = config.sweep.strategy in ("lr", "independent", "grid")
    edge = lines and len(rates) > 1 and best.get("lr") in (rates[0], rates[-1])
    ends = [f"the best {name} is at an end of the values tried; widen sweep.space" for name, value in best.items()
            if lines and name != "lr" and (tried := config.sweep.space.get(name, ())) and len(tried) > 1
            and value in (min(tried), max(tried))]  # fmt: skip
    told = tuple(dict.fromkeys([*warnings, *ends]))  # some come from the file, and were made here before
    return SweepResult(out, config, trials, best, loss, edge, sum(t.seconds for t in trials), sure, stopped, told)


def rows_of(data: Mapping[str, Any]) -> tuple[TrialRow, ...]:
    """The rows in `study.json`; numbers that JSON has not as text."""
    rows = [{**row, "loss": float(row["loss"]), "seconds": float(row["seconds"])} for row in data.get("trials", ())]
    return tuple(TrialRow(**row) for row in rows)


def load(out: Path | str) -> SweepResult:
    """The result of a sweep folder, finished or not.

    Raises:
        CheckpointError: there is no sweep, or none of its trials is done.
    """
    out = Path(out)
    path = out / "study.json"
    data = read_json(path) if path.exists() else {}
    if not isinstance(data, dict):
        raise CheckpointError("study.json is damaged", place=str(path), hint="restore it, or sweep again")
    if not data and not (out / "study.db").exists():
        raise CheckpointError("no sweep here", key="study.json", place=str(out),
                              hint="give the folder that isoscale sweep --out made")  # fmt: skip
    rows = rows_of(data)
    if not data.get("finished") and not data.get("storage"):  # the storage knows more than the file
        from isoscale.sweep.ledger import Ledger
        from isoscale.sweep.store import Store, url

        store, ledger = Store(url(out), create=False), Ledger(())
        try:
            ledger.merge(store.trials(), set())
        finally:
            store.close()
        rows = ledger.rows()
    result = summarise(out, read_config(out), rows, data.get("stopped", ""), tuple(data.get("warnings", ())))
    if math.isnan(result.loss):
        raise CheckpointError(
            "no trial of this sweep has finished with a finite loss",
            place=str(out),
            hint="isoscale sweep --resume, or lower learning rates",
        )
    return result
