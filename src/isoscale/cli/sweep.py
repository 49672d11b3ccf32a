"""isoscale sweep: tune the proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isoscale.cli.common import AsJson, ConfigFile, Data, Preset, Quiet, Resume, Sets, emit, load_config

if TYPE_CHECKING:
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
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None, info="")

        def update(status: Status) -> None:
            best = f"best {status.best} {status.loss:.3f}" if status.best else ""
            left = f"  {clock(status.seconds_left)} left" if status.seconds_left == status.seconds_left else ""
            progress.update(task, total=status.total, completed=status.done, info=best + left)

        yield update


def table(result: SweepResult) -> str:
    """Trials sorted by point, best marked."""
    from isoscale.sweep.space import show

    lines = [f"{'point':32s} {'seed':>4s} {'loss':>9s} {'seconds':>8s}"]
    for trial in sorted(result.trials, key=lambda t: (sorted(t.point.items()), t.seed)):
        mark = "  <- best" if dict(trial.point) == dict(result.best) else ""
        lines.append(f"{show(trial.point):32s} {trial.seed:4d} {trial.loss:9.4f} {trial.seconds:8.1f}{mark}")
    return "\n".join(lines)


def sweep(
    out: Annotated[Path, typer.Option("--out", "-o", help="Sweep folder.", metavar="DIR")] = Path("runs/sweep"),
    config: ConfigFile = None, preset: Preset = None, set_: Sets = None, data: Data = None,
    workers: Annotated[int | None, typer.Option("--workers", "-w", min=1, help="Processes, one thread each.")] = None,
    resume: Resume = False, quiet: Quiet = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Search hyperparameters on the proxy: LR line, independent or random search, in base units.

    \b
    Examples:
      isoscale sweep --preset proxy --out runs/sweep
      isoscale sweep --set sweep.strategy=independent \\
          --set 'sweep.space={lr=[0.5,1,2,4], alpha_res=[0.5,1,2]}'
      isoscale sweep --set sweep.strategy=random --set sweep.trials=20 \\
          --set sweep.budget_tokens=5e6
      isoscale sweep --out runs/sweep --resume
    """
    from isoscale.sweep import sweep as run
    from isoscale.sweep.space import show

    flags = [*(set_ or []), *([f"sweep.workers={workers}"] if workers else [])]
    loaded = load_config(preset, config, flags, data)
    with sweep_bar("sweep", quiet) as bar:
        result = run(loaded.config, out, resume=resume, on_status=bar)
    text = f"{table(result)}\n\nbest: {show(result.best)}, loss {result.loss:.4f}\nfolder: {result.out}"
    if result.edge:
        text += "\nwarning: the best LR is at an end of the values tried; widen sweep.space"
    emit(as_json, result.to_dict(), f"{text}\nnext: isoscale transfer {out} --width {loaded.config.model.width * 4}")
