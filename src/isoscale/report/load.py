"""What the page needs, out of the files of a run, sweep or quickstart folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isoscale._base.errors import CheckpointError
from isoscale._base.log import read as read_log

Kind = Literal["quickstart", "sweep", "run"]


@dataclass(frozen=True)
class Run:
    """One run's files.

    Args:
        path: its folder.
        config: `run.json`.
        train, evals, casts: metric rows by kind.
        plan: `plan.json`, or None.
    """

    path: Path
    config: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    casts: list[dict[str, Any]]
    plan: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The config's name, width and LR."""
        return f"{self.config['name']}, width {self.config['model']['width']}"

    @property
    def loss(self) -> float:
        """Last validation loss; inf when there is none."""
        return float(self.evals[-1]["val_loss"]) if self.evals else float("inf")

    @property
    def finished(self) -> bool:
        """Whether the last step was evaluated."""
        return bool(self.evals) and self.evals[-1]["step"] == self.config["train"]["steps"]


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("the file is missing", place=str(path), hint="is this a folder isoscale made?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the file is damaged: {error}", place=str(path)) from None


def kind_of(folder: Path) -> Kind:
    """What a folder holds.

    Raises:
        CheckpointError: nothing that isoscale made.
    """
    if (folder / "transfer.json").exists():
        return "quickstart"
    if (folder / "study.json").exists() and read_json(folder / "study.json").get("finished"):
        return "sweep"
    if (folder / "metrics.jsonl").exists():
        return "run"
    begun = any((folder / name).exists() for name in ("study.json", "study.db"))
    hint = "the sweep has not finished: isoscale sweep --resume" if begun else \
           "give a folder made by isoscale train, sweep or quickstart"  # fmt: skip
    raise CheckpointError("there is nothing to report on", key="DIR", value=str(folder), hint=hint)


def read_run(path: Path) -> Run:
    """One run folder."""
    rows = read_log(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    plan = read_json(path / "plan.json") if (path / "plan.json").exists() else None
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "eval": [], "cast": []}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    return Run(path, read_json(path / "run.json"), kinds["train"], kinds["eval"], kinds["cast"], plan)


def read_sweep(path: Path) -> tuple[dict[str, Any], list[Run]]:
    """`study.json`, and the runs of its trials in its order; trials that were no runs of isoscale have none."""
    sweep = read_json(path / "study.json")
    done = [path / "trials" / trial["id"] for trial in sweep["trials"] if trial["state"] == "done"]
    return sweep, [read_run(folder) for folder in done if (folder / "run.json").exists()]
