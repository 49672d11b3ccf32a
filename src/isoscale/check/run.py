"""The whole check: cells that are missing are run and logged, then everything there is judged.

Rows go to `rows.jsonl` as they come; a cell whose fingerprint is there is not run again, so a killed check continues
where it stopped. `check.json` is the verdict.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isoscale._base.files import atomic_write
from isoscale._base.log import JsonLog, dumps, read
from isoscale.check.judge import Finding, Suspect, Trend, findings, suspect, tensors, trends
from isoscale.check.measure import Row, coordinates
from isoscale.check.prepare import fingerprint, prepare
from isoscale.check.settings import CheckSettings
from isoscale.check.subject import Subject, resolve
from isoscale.check.transfer import EXPECTED, Transfer, sweep, train_loss
from isoscale.train.folder import locked

VERSION = 1


@dataclass(frozen=True)
class Status:
    """How far a check is: runs done and planned, what runs now, estimated seconds left (NaN at first)."""

    done: int
    total: int
    label: str
    seconds_left: float


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Args:
        target: as the user named it.
        settings: what was asked for.
        verdict: passes, fails or undecided.
        findings: per tensor, axis and quantity.
        parameters: per parameter and axis.
        suspects: the first tensor that breaks, per axis.
        transfer: per axis, if asked for.
        notes: what is not as in the user's model, and what it was trained on.
        out: the folder.
    """

    target: str
    settings: CheckSettings
    verdict: str
    findings: tuple[Finding, ...]
    parameters: tuple[Trend, ...]
    suspects: tuple[Suspect, ...]
    transfer: tuple[Transfer, ...]
    notes: tuple[str, ...]
    out: Path

    @property
    def passes(self) -> bool:
        """Whether nothing is broken (undecided tensors do not fail a check)."""
        return self.verdict != "fails"

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the content of `check.json`."""
        base = dict(zip(("width", "depth"), self.settings.base))
        settings = {**self.settings.to_dict(), "lr": self.settings.peak_lr}
        return {
            "version": VERSION, "target": self.target, "verdict": self.verdict, "base": base, "settings": settings,
            "notes": list(self.notes), "suspects": [asdict(one) for one in self.suspects],
            "tensors": [asdict(one) for one in self.findings],
            "parameters": [{**asdict(one), "eps_dominates": one.eps_dominates} for one in self.parameters],
            "transfer": [one.to_dict() for one in self.transfer],
        }  # fmt: skip


class _Cells:
    """Runs cells that are not in the log, and says how far it is."""

    def __init__(self, subject: Subject, settings: CheckSettings, path: Path,
                 on_status: Callable[[Status], None] | None) -> None:  # fmt: skip
        self.subject, self.settings, self.on_status = subject, settings, on_status
        self.known = {row["key"]: row for row in read(path)}
        self.log = JsonLog(path)
        self.begun, self.work, self.left, self.done, self.total = time.perf_counter(), 0.0, 0.0, 0, 0
        self.say, self.notes = "", dict[str, None]()
        self.baseline: float | None = None

    def plan(self, models: Sequence[tuple[int, int]], runs: int, steps: int) -> None:
        """Announce work, so that the time left can be told."""
        self.total += len(models) * runs
        self.left += sum(width * width * depth for width, depth in models) * runs * steps

    def run(self, kind: str, width: int, depth: int, seed: int, octave: int = 0) -> Row:
        """The row of one cell."""
        settings, steps = self.settings, self.settings.steps if kind == "coordinates" else self.settings.transfer_steps
        label = f"width {width}, depth {depth}, seed {seed}" + (f", lr x 2^{octave}" if kind == "transfer" else "")
        self.tell(label)
        ready = prepare(self.subject, settings, width, depth, seed, settings.peak_lr * 2.0**octave)
        self.say, self.baseline = ready.task.say, ready.task.baseline
        self.notes.update(dict.fromkeys(ready.notes))
        cell = {"kind": kind, "width": width, "depth": depth, "seed": seed, "octave": octave, "steps": steps}
        key = hashlib.sha256(json.dumps([cell, fingerprint(ready)]).encode()).hexdigest()[:16]
        work = float(width * width * depth * steps)
        if key not in self.known:
            begun = time.perf_counter()
            found = coordinates(ready, steps) if kind == "coordinates" else {"loss": train_loss(ready, steps)}
            self.known[key] = {"key": key, **cell, **found, "seconds": round(time.perf_counter() - begun, 3)}
            self.log.append(self.known[key])
            self.work += work
        self.left, self.done = max(0.0, self.left - work), self.done + 1
        self.total = max(self.total, self.done)
        self.tell(label)
        return self.known[key]

    def tell(self, label: str) -> None:
        if self.on_status is not None:
            spent = time.perf_counter() - self.begun
            seconds = spent / self.work * self.left if self.work else float("nan")
            self.on_status(Status(self.done, self.total, label, seconds))


def _overall(found: Sequence[Finding], moved: Sequence[Transfer]) -> str:
    if any(finding.ok is False for finding in found) or any(one.found.verdict == "refuted" for one in moved):
        return "fails"
    unsure = any(finding.ok is None for finding in found) or any(one.found.verdict == "undecided" for one in moved)
    return "undecided" if unsure else "passes"


def run_check(
    target: str | Callable[..., Any], out: Path | str = "runs/check", settings: CheckSettings | None = None, *,
    on_status: Callable[[Status], None] | None = None,
) -> CheckResult:  # fmt: skip
    """Check whether a model keeps its scales, and its learning rate, as it grows.

    Args:
        target: `module:function`, a Hugging Face config or its folder, `isoscale`, or a function of width and depth
            that returns a model.
        out: folder for `rows.jsonl` and `check.json`; what is finished there is used again.
        settings: sizes, rule and effort.
        on_status: called before and after every run.

    Raises:
        ConfigError: a setting or the target makes no sense.
        PlanError: the rule does not fit the model.
        CheckpointError: another process works in the folder.
    """
    settings = settings or CheckSettings()
    out = Path(out)
    smallest = min(settings.widths[0], settings.base[0])
    subject = resolve(target, smallest=smallest, unit=settings.unit)
    axes = settings.axes(subject.has_depth)
    ends: Mapping[str, list[tuple[int, int]]] = {axis: [models[0], models[-1]] for axis, models in axes.items()}
    with locked(out):
        cells = _Cells(subject, settings, out / "rows.jsonl", on_status)
        try:
            for axis, models in axes.items():
                cells.plan(models, settings.seeds, settings.steps)
                if settings.transfer:
                    cells.plan(ends[axis], settings.seeds * EXPECTED, settings.transfer_steps)
            found: list[Finding] = []
            parameters: list[Trend] = []
            suspects: list[Suspect] = []
            for axis, models in axes.items():
                rows = {(model[axis == "depth"], seed): cells.run("coordinates", *model, seed)
                        for model in models for seed in range(settings.seeds)}  # fmt: skip
                here, there = findings(tensors(rows, axis), axis), trends(rows, axis)
                found, parameters = [*found, *here], [*parameters, *there]
                if (first := suspect(here, there)) is not None:
                    suspects.append(first)
            moved = []
            for axis, models in ends.items() if settings.transfer else ():
                small, large = (model[axis == "depth"] for model in models)
                at = dict(zip((small, large), models))

                def losses(size: int, octave: int, at: dict[int, tuple[int, int]] = at) -> dict[int, float]:
                    return {seed: float(cells.run("transfer", *at[size], seed, octave)["loss"])
                            for seed in range(settings.seeds)}  # fmt: skip

                moved.append(sweep(axis, (small, large), settings.peak_lr, cells.baseline, losses))
        finally:
            cells.log.close()
        notes = (*subject.notes, f"trained on: {cells.say}", *cells.notes)
        result = CheckResult(subject.name, settings, _overall(found, moved), tuple(found), tuple(parameters),
                             tuple(suspects), tuple(moved), notes, out)  # fmt: skip
        atomic_write(out / "check.json", dumps(result.to_dict(), indent=1))
    return result
