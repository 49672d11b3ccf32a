"""Progress bars with loss, speed and time left. They go to stderr, so that --json output stays clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from isoscale.train import Tick


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def training_bar(title: str, quiet: bool) -> Iterator[Callable[[Tick], None] | None]:
    """A bar for one run; yields what `train` wants as `on_step`."""
    if quiet:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
               TextColumn("{task.fields[info]}"))  # fmt: skip
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task(title, total=None, info="")
    try:

        def update(tick: Tick) -> None:
            progress.start()  # not before the first step: a refusal should stand alone on the screen
            info = f"loss {tick.loss:.3f}  {tick.tokens_per_second / 1000:.1f}k tok/s  {clock(tick.seconds_left)} left"
            progress.update(task, total=tick.steps, completed=tick.step, info=info)

        yield update
    finally:
        progress.stop()
