"""isoscale check: does a model transfer?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isoscale._base.errors import ConfigError
from isoscale.cli.common import AsJson, Quiet, emit

if TYPE_CHECKING:
    from isoscale.check import CheckResult, Finding, Status

_NAME = 34


@contextmanager
def check_bar(quiet: bool) -> Iterator[Callable[[Status], None] | None]:
    """A bar over runs with what runs now and the time left."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from isoscale.cli.progress import clock

    columns = (TextColumn("check"), BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.fields[info]}"))
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task("check", total=None, info="")
    try:

        def update(status: Status) -> None:
            progress.start()  # not before the first run: a refusal should stand alone on the screen
            left = f"  {clock(status.seconds_left)} left" if status.seconds_left == status.seconds_left else ""
            progress.update(task, total=status.total, completed=status.done, info=status.label + left)

        yield update
    finally:
        if progress.live.is_started:
            progress.stop()


def _sizes(text: str, flag: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        hint = f"{flag} 64,128,256"
        raise ConfigError("sizes are whole numbers with commas between", key=flag, value=text, hint=hint) from None


def _folded(name: str) -> str:
    """The name for the screen: numbers as `*`, and cut in front to fit."""
    text = ".".join("*" if part.isdigit() else part for part in name.split("."))
    return text if len(text) <= _NAME else "~" + text[1 - _NAME :]


def _mark(finding: Finding | None) -> str:
    """Slope and mark: `!` broken, `?` undecided."""
    if finding is None or finding.verdict == "constant":
        return f"{'-':>9s} "
    if finding.slope != finding.slope:
        return f"{'not finite':>9s}!"[-10:]
    return f"{finding.slope:+9.2f}{'!' if finding.ok is False else '?' if finding.ok is None else ' '}"


def slopes_table(result: CheckResult) -> str:
    """Slopes of value and change over width and depth; of like tensors in different blocks the worst."""
    worst: dict[str, dict[tuple[str, str], Finding]] = {}
    for finding in result.findings:
        row = worst.setdefault(_folded(finding.name), {})
        at = finding.axis, finding.quantity
        rank = {False: 2, None: 1, True: 0}
        new, old = finding, row.get(at)
        if old is None or (rank[new.ok], abs(new.slope)) > (rank[old.ok], abs(old.slope)):
            row[at] = finding
    axes = list(dict.fromkeys(finding.axis for finding in result.findings))
    columns = [(axis, quantity) for axis in axes for quantity in ("value", "change")]
    head = f"{'':{_NAME}s}" + "".join(f"{'over ' + axis:>20s}" for axis in axes)
    lines = [head, f"{'tensor':{_NAME}s}" + "".join(f"{quantity:>9s} " for _, quantity in columns)]
    lines += [f"{name:{_NAME}s}" + "".join(_mark(row.get(at)) for at in columns) for name, row in worst.items()]
    return "\n".join(line.rstrip() for line in lines)


def _verdict(result: CheckResult) -> list[str]:
    import textwrap

    lines = []
    for axis in dict.fromkeys(finding.axis for finding in result.findings):
        here = [finding for finding in result.findings if finding.axis == axis]
        bad, unsure = sum(one.ok is False for one in here), sum(one.ok is None for one in here)
        said = f"{bad} broken" + (f", {unsure} undecided" if unsure else "") if bad or unsure else "all flat"
        lines.append(f"{axis}: {len(here)} slopes, {said}")
        if unsure and not bad:
            far = max((one for one in here if one.ok is None), key=lambda one: abs(one.slope))
            text = f"undecided: {far.name} ({far.quantity} slope {far.slope:+.2f}) and its like: wider --{axis} decides"
            lines += textwrap.wrap(text, 80, subsequent_indent="  ", break_on_hyphens=False)
    for one in result.suspects:
        text = f"suspect: {one.name} ({one.quantity} slope {one.slope:+.2f} over {one.axis}): {one.why}"
        lines += textwrap.wrap(text, 80, subsequent_indent="  ", break_on_hyphens=False)
    drowned = list(dict.fromkeys(one.name for one in result.parameters if one.eps_dominates))
    if drowned:
        text = f"note: gradients below 10 x eps: {', '.join(drowned[:3])}" + (" ..." if len(drowned) > 3 else "")
        lines += textwrap.wrap(text, 80, subsequent_indent="  ", break_on_hyphens=False)
    for moved in result.transfer:
        found = moved.found
        shift, cost = found.octaves, found.cost
        lines.append(f"transfer, {moved.axis} {moved.small} to {moved.large}: {found.verdict}")
        lines.append(f"  best LR moves {shift[0]:+.2f} octaves [{shift[1]:+.2f}, {shift[2]:+.2f}]")
        lines.append(f"  keeping it costs {cost[0]:.3f} nats [{cost[1]:.3f}, {cost[2]:.3f}]")
        if found.edge:
            lines.append("  an optimum lies at the edge of the LRs tried: choose another --lr")
        if not found.learned:
            lines.append("  the runs did not learn more than pairs of bytes: raise --transfer-steps")
    return lines


def screen(result: CheckResult, page: Path | None) -> str:
    """What the command prints."""
    settings = result.settings
    width, depth = settings.base
    lines = [f"{result.target}: rule {settings.rule}, base width {width}, depth {depth}; "
             f"{settings.optimizer} lr {settings.peak_lr:g}"]  # fmt: skip
    lines += [f"  {note}" for note in result.notes]
    lines += ["", slopes_table(result), "", *_verdict(result), "", f"verdict: {result.verdict}"]
    if not result.transfer:
        lines.append("A flat check does not prove that the LR transfers: --transfer trains and sees.")
    lines.append(f"page: {page}" if page else f'folder: {result.out} (pip install "isoscale[report]" for a page)')
    return "\n".join(lines)


def _page(out: Path) -> Path | None:
    """The page, or None without plotly."""
    from isoscale._base.errors import MissingDependencyError
    from isoscale.report.check_page import write_check_page

    try:
        return write_check_page(out)
    except MissingDependencyError:
        return None


def check(
    target: Annotated[str, typer.Argument(metavar="TARGET",
                      help="module:function, a Hugging Face config.json or its folder, or isoscale.")],
    width: Annotated[str, typer.Option("--width", help="Widths to compare.", metavar="N,N,..")] = "64,128,256",
    depth: Annotated[str, typer.Option("--depth", help="Depths to compare.", metavar="N,N,..")] = "2,4,8",
    rule: Annotated[str, typer.Option("--rule", help="A parametrisation, or none: the model as it is.")] = "complete-d",
    base_width: Annotated[int | None, typer.Option("--base-width", min=1, help="Default: the smallest.")] = None,
    base_depth: Annotated[int | None, typer.Option("--base-depth", min=1, help="Default: the smallest.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the coordinate check.")] = 5,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each size.")] = 3,
    transfer: Annotated[bool, typer.Option("--transfer", help="Sweep the LR too (minutes).")] = False,
    transfer_steps: Annotated[int, typer.Option("--transfer-steps", min=10, help="Steps of its runs.")] = 200,
    lr: Annotated[float | None, typer.Option("--lr", help="LR in base units: 1e-3, or 0.25 if unit-scaled.")] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, sgd, lion, muon, muon-rms, adafactor, "
                                                 "madam, lmd.")] = "adamw",
    data: Annotated[str | None, typer.Option("--data", help="Text file or folder.", metavar="PATH")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; finished runs in it are kept.",
                                      metavar="DIR")] = Path("runs/check"),
    quiet: Quiet = False, as_json: AsJson = False,
) -> int:  # fmt: skip
    """Check that a model keeps its scales, and its best LR, as it grows; exit code 1 if not.

    \b
    Examples:
      isoscale check mymodel:build
      isoscale check path/to/config.json --rule none
      isoscale check mymodel:build --width 128,256,512 --depth 4 --transfer
      isoscale check isoscale --rule mup --depth 2 --json
    """
    from isoscale.check import CheckSettings, run_check

    settings = CheckSettings(
        widths=_sizes(width, "--width"), depths=_sizes(depth, "--depth"), rule=rule, base_width=base_width,
        base_depth=base_depth, steps=steps, seeds=seeds, lr=lr, optimizer=optimizer, data=data, transfer=transfer,
        transfer_steps=transfer_steps,
    )  # fmt: skip
    with check_bar(quiet) as bar:
        result = run_check(target, out, settings, on_status=bar)
    emit(as_json, result.to_dict(), screen(result, _page(out)))
    return 0 if result.passes else 1
