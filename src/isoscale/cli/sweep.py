"""isoscale sweep: tune the proxy."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isoscale._base.errors import ConfigError
from isoscale.cli.common import AsJson, ConfigFile, Data, Preset, Quiet, Resume, Sets, emit, load_config

if TYPE_CHECKING:
    from isoscale.config import SweepSection
    from isoscale.sweep import Status, SweepResult


@contextmanager
def sweep_bar(title: str, quiet: bool) -> Iterator[Callable[[Status], None] | None]:
    """A bar over trials with the best so far and the time left."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from isoscale.cli.progress import clock

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
               TextColumn("{task.fields[info]}"))  # fmt: skip
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task(title, total=None, info="")

    def update(status: Status) -> None:
        if not progress.live.is_started:  # not before: what is refused at once shows no bar
            if status.estimate:
                progress.console.print(f"estimate: {status.estimate}", highlight=False)
            progress.start()
        best = f"best {_short(status.best)} {status.loss:.3f}" if status.best else ""
        failed = f"  {status.failed} failed" if status.failed else ""
        left = f"  {clock(status.seconds_left)} left" if status.seconds_left == status.seconds_left else ""
        progress.update(task, total=status.total, completed=status.done, info=best + failed + left)

    try:
        yield update
    finally:
        if progress.live.is_started:
            progress.stop()


WIDEST = 32  # characters of a point in a line of a table


def _short(point: str) -> str:
    """A point in words, cut where it would not fit."""
    return point if len(point) <= WIDEST else f"{point[: WIDEST - 4].rpartition(' ')[0]} ..."


def table(result: SweepResult) -> str:
    """Trials sorted by point, best marked; by identity and loss where points are too long for a line."""
    from isoscale.sweep.space import show

    names = {trial.id: show(trial.point) for trial in result.trials}
    long = any(len(name) > WIDEST for name in names.values())
    lines = [f"{'trial' if long else 'point':32s} {'seed':>4s} {'loss':>9s} {'seconds':>8s}"]
    ordered = sorted(result.trials, key=lambda t: (sorted(t.point.items()), t.seed))
    for trial in sorted(ordered, key=lambda t: t.loss if t.loss == t.loss else math.inf) if long else ordered:
        mark = "  <- best" if dict(trial.point) == dict(result.best) else ""
        note = f"  {trial.state}" if trial.state != "done" else "  confirms" if trial.confirm else mark
        name = trial.id if long else names[trial.id]
        lines.append(f"{name:32s} {trial.seed:4d} {trial.loss:9.4f} {trial.seconds:8.1f}{note}")
        if trial.error:
            lines.append(textwrap.fill(trial.error.splitlines()[0], 80, initial_indent="  ", subsequent_indent="  "))
    return "\n".join(lines)


def _points(runs: int, section: SweepSection) -> int:
    """How many points so many runs pay for, with the confirmation of the best; at least one."""
    each, kept = max(1, len(section.seeds)), section.confirm_seeds
    return next((n for n in range(runs, 0, -1) if n * each + min(n, section.confirm) * kept <= runs), 1)


def closing(result: SweepResult, next_width: int) -> str:
    """What follows the table: the winner in full, how sure that is, what to do next."""
    from isoscale.sweep.space import show

    best = textwrap.fill(f"best: {show(result.best)}, loss {result.loss:.4f}", 80, subsequent_indent="      ")
    lines = [best]
    sure = result.confidence
    if sure is not None:
        mean = sure.contenders[0].interval
        lines.append(f"confirmed on {mean.count} fresh seeds: {mean.mean:.4f}, 95 % {mean.low:.4f} to {mean.high:.4f}")
        if sure.gap is not None:
            lines.append(f"the second is {sure.gap.mean:.4f} worse, 95 % {sure.gap.low:.4f} to {sure.gap.high:.4f}: "
                         + ("settled" if sure.settled else "not settled"))  # fmt: skip
    if result.stopped:
        lines.append(f"stopped early by {result.stopped}")
    lines.append(f"folder: {result.out}")
    if result.edge:
        lines.append("warning: the best LR is at an end of the values tried; widen sweep.space")
    lines += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join([*lines, f"next: isoscale transfer {result.out} --width {next_width}"])


def sweep(
    out: Annotated[Path, typer.Option("--out", "-o", help="Sweep folder.", metavar="DIR")] = Path("runs/sweep"),
    config: ConfigFile = None, preset: Preset = None, set_: Sets = None, data: Data = None,
    strategy: Annotated[str | None, typer.Option("--strategy", help="lr, independent, coordinate, grid, random, tpe, "
                                                 "gp, trust-region.", metavar="NAME")] = None,
    runs: Annotated[int | None, typer.Option("--runs", min=1, help="Train so many runs at most.")] = None,
    budget_tokens: Annotated[float | None, typer.Option("--budget-tokens", help="Tokens of all runs.")] = None,
    budget_flops: Annotated[float | None, typer.Option("--budget-flops", help="FLOPs of all runs.")] = None,
    executor: Annotated[str | None, typer.Option("--executor", help="inline, processes, ray.", metavar="NAME")] = None,
    workers: Annotated[str | None, typer.Option("--workers", "-w", help="Trials at a time, or auto.",
                                                metavar="N|auto")] = None,
    storage: Annotated[str | None, typer.Option("--storage", help="Database of the study; none: in the folder.",
                                                metavar="URL")] = None,
    resume: Resume = False, quiet: Quiet = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Search hyperparameters on the proxy, in base units, under a budget.

    \b
    Examples:
      isoscale sweep --preset proxy --out runs/sweep
      isoscale sweep --strategy independent \\
          --set 'sweep.space={lr=[0.5,1,2,4], alpha_res=[0.5,1,2]}'
      isoscale sweep --strategy random --runs 20 --budget-tokens 5e6
      isoscale sweep --strategy tpe --runs 60 --set sweep.prune=asha \\
          --set sweep.confirm_seeds=3 --workers auto
      isoscale sweep --storage postgresql://me@db/sweeps   # on each machine
      isoscale sweep --executor ray --set sweep.ray_address=auto
      isoscale sweep --out runs/sweep --resume
    """
    from isoscale.sweep import sweep as run

    given = {"storage": storage, "strategy": strategy, "executor": executor, "workers": workers,
             "budget_runs": runs, "budget_tokens": budget_tokens, "budget_flops": budget_flops}  # fmt: skip
    if workers is not None and workers != "auto" and not (workers.isdigit() and int(workers)):
        raise ConfigError("workers are a number above zero, or auto", key="--workers", value=workers,
                          hint="--workers 2")  # fmt: skip
    flags = [*(set_ or []), *(f"sweep.{name}={value}" for name, value in given.items() if value is not None)]
    layers = load_config(preset, config, flags, data, resumed=out if resume else None)
    loaded = layers.config
    free = loaded.sweep.trials is None or layers.origin("sweep.trials") == f"preset {out}"  # not the user's own words
    if runs and free and loaded.sweep.strategy in ("random", "tpe", "gp", "trust-region"):
        loaded = loaded.with_values(**{"sweep.trials": _points(runs, loaded.sweep)})
    if loaded.sweep.modules.hps and not quiet:
        from isoscale.sweep.space import Space

        typer.echo(f"space: {Space.of(loaded)}", err=True)
    with sweep_bar("sweep", quiet) as bar:
        say = None if quiet else partial(typer.echo, err=True)
        result = run(loaded, out, resume=resume, on_status=bar, on_line=say)
    emit(as_json, result.to_dict(), f"{table(result)}\n\n{closing(result, loaded.model.width * 4)}")
