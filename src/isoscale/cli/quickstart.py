"""isoscale quickstart: the main job, on real text, on a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isoscale.cli.common import AsJson, Data, Quiet, Resume, Sets, emit, load_config

if TYPE_CHECKING:
    from isoscale.sweep.pool import PoolStatus


def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder.", metavar="DIR")] = Path("runs/quickstart"),
    data: Data = None, set_: Sets = None,
    target_width: Annotated[int, typer.Option("--target-width", min=1, help="Width of the target.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    resume: Resume = False, quiet: Quiet = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Tune a proxy, carry its learning rate to a 4x wider model, train that in FP8, with SP as the control.

    Takes a few minutes on two cores. Ends with the numbers and a report page.

    \b
    Examples:
      isoscale quickstart
      isoscale quickstart --data my_texts/ --out runs/mine
      isoscale quickstart --out runs/mine --resume
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from isoscale.cli.progress import clock
    from isoscale.report import write_report
    from isoscale.sweep import Display, Status
    from isoscale.sweep import quickstart as run

    base = load_config("proxy", None, [f"seed={seed}", "train.steps=200", *(set_ or [])], data).config
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[info]}"))
    with Progress(*columns, console=console, disable=quiet) as progress:
        task = progress.add_task("starting", total=None, info="")
        count = 0

        def stage(text: str) -> None:
            nonlocal count
            count += 1
            if not quiet:
                progress.console.print(f"[{count}/3] {text}", markup=False)
            progress.update(task, description=f"stage {count} of 3", total=None, completed=0, info="starting workers")

        def on_sweep(status: Status) -> None:
            best = f"best {status.best} {status.loss:.3f}" if status.best else ""
            left = f"  {clock(status.seconds_left)} left" if status.seconds_left == status.seconds_left else ""
            progress.update(task, total=status.total, completed=status.done,
                            info=f"{status.done}/{status.total} runs  {best}{left}")  # fmt: skip

        def on_runs(status: PoolStatus) -> None:
            left = f"  {clock(status.seconds_left)} left" if status.seconds_left == status.seconds_left else ""
            progress.update(task, total=status.steps, completed=status.steps_done,
                            info=f"{status.runs_done}/{status.runs} runs{left}")  # fmt: skip

        result = run(base, out, target_width=target_width, resume=resume, display=Display(stage, on_sweep, on_runs))
    write_report(out)
    emit(as_json, result, closing(result))


def closing(result: dict[str, Any]) -> str:
    """The last screen: transferred HPs, losses, FP8 gap, control, report."""
    target, sp, proxy = result["target"], result["sp"], result["proxy"]
    small, wide = f"width {proxy['width']:4d}", f"width {target['width']:4d}"
    fp8 = f"{target['recipe']} ({target['backend']}), gap {target['fp8_gap']:+.4f}"
    lines = [
        "",
        f"Transferred, unchanged:   lr = {result['lr']:g} (base units), tuned at width {proxy['width']}",
        "",
        "                          validation loss, nats/token",
        f"  u-muP proxy   {small}   {proxy['loss']:.4f}",
        f"  u-muP target  {wide}   {target['loss_fp32']:.4f}   fp32",
        f"  u-muP target  {wide}   {target['loss_fp8']:.4f}   {fp8}",
        f"  SP proxy      {small}   {sp['proxy_loss']:.4f}   lr {sp['lr']:g}",
        f"  SP target     {wide}   {sp['target_loss']:.4f}   the same lr, carried over",
        f"  SP target     {wide}   {sp['target_best_loss']:.4f}   lr {sp['target_best_lr']:g}, best of those tried",
        "",
        *(f"warning: {text}" for text in result["warnings"]),
        f"{result['seconds']:.0f} s. Report: {result['report']}",
    ]
    return "\n".join(lines)
