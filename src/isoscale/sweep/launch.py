"""Trials that are commands of their own, for example `torchrun`: the objective of `sweep.command`.

The command's words may hold `{config}` (the trial's config, `trial.toml`; `trial.json` stands beside it) and `{out}`
(its folder), which are filled in. The environment has ISOSCALE_TRIAL, the folder. The command writes `result.json`
there, `{"val_loss": 1.23}` (rank 0 only), and may append lines `{"share": 0.3, "loss": 1.5}` to `reports.jsonl`, by
which the search prunes. What it prints goes to `command.log`. When the search wants an end, the whole process group
gets SIGTERM.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from isoscale._base.errors import CheckpointError, ConfigError, IsoscaleError
from isoscale._base.files import atomic_write, read_json
from isoscale._base.log import read
from isoscale.config import RunConfig
from isoscale.config.toml import to_toml
from isoscale.sweep.job import Job, Outcome, Report

LOOK, PATIENCE = 0.2, 20.0  # seconds between looks, and for the command to end after SIGTERM


def objective(job: Job, report: Report) -> Outcome:
    """Run the command once and read its result.

    Raises:
        IsoscaleError: it fails (with the last line of its log), or leaves no result.
        Pruned: a report says so.
    """
    folder, tree = Path(job.folder), json.loads(job.config)
    words = tree["sweep"]["command"]
    atomic_write(folder / "trial.json", json.dumps({**tree, "point": dict(job.point)}, indent=1))
    atomic_write(folder / "trial.toml", "\n".join(to_toml(RunConfig.model_validate_json(job.config))) + "\n")
    for name in ("result.json", "reports.jsonl"):
        (folder / name).unlink(missing_ok=True)
    command = [word.replace("{config}", str(folder / "trial.toml")).replace("{out}", str(folder)) for word in words]
    begun, told = time.perf_counter(), 0
    with (folder / "command.log").open("ab") as log:
        try:
            process = subprocess.Popen(
                command, env={**os.environ, "ISOSCALE_TRIAL": str(folder)}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_with_parent(),
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(f"the command cannot be started: {error.strerror}", key="sweep.command", value=command[0],
                              hint="is it on the PATH of the workers?") from None  # fmt: skip
    try:
        while process.poll() is None:
            told = _reports(folder, told, report)
            time.sleep(LOOK)
        _reports(folder, told, report)
    finally:
        _end(process)
    if process.returncode:
        lines = (folder / "command.log").read_text(errors="replace").strip().splitlines()
        raise IsoscaleError(f"the command ended with {process.returncode}: {lines[-1][:300] if lines else 'no output'}",
                            place=str(folder / "command.log"))  # fmt: skip
    return Outcome(_loss(folder), time.perf_counter() - begun)


def _loss(folder: Path) -> float:
    found = read_json(folder / "result.json")
    try:
        loss = float(found["val_loss"])  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError("the command's result.json has no val_loss", place=str(folder / "result.json"),
                              hint='{"val_loss": 1.23}, written by rank 0') from None  # fmt: skip
    return loss if loss == loss else float("inf")


def _reports(folder: Path, told: int, report: Report) -> int:
    """Pass new lines on; how many there are now. A line that is half written waits for the next look."""
    if not (folder / "reports.jsonl").exists():
        return told
    rows = read(folder / "reports.jsonl")
    for row in rows[told:]:
        report(float(row["share"]), float(row["loss"]))
    return len(rows)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the whole group, and SIGKILL to what is still there."""
    for number, wait in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=wait)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _with_parent() -> Callable[[], object] | None:
    """On Linux the command gets SIGTERM when its worker is killed, so that no orphan works beside the next attempt."""
    if sys.platform != "linux":
        return None
    call, death = ctypes.CDLL(None, use_errno=True).prctl, 1  # PR_SET_PDEATHSIG
    return lambda: call(death, signal.SIGTERM)
