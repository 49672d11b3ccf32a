"""The pages of a run, a quickstart and a sweep folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from isoscale._base.errors import CheckpointError
from isoscale._base.files import atomic_write
from isoscale._base.optional import need
from isoscale.report import figures
from isoscale.report.document import Loss, Page, plan_table, shown, table
from isoscale.report.load import Run, kind_of, read_json, read_run
from isoscale.report.sweep_page import sweep_page


def run_page(folder: Path) -> Page:
    """One run: curves, casts, plan."""
    run = read_run(folder)
    steps, last = run.config["train"]["steps"], run.train[-1]["step"] + 1 if run.train else 0
    note = f"validation loss {run.loss:.4f} nats/token after {last} steps" if run.finished else \
           f"did not finish: {last} of {steps} steps" + (f", last validation loss {run.loss:.4f}" if run.evals else "")
    page = Page(run.name, note)
    page.add("Curves", page.figure(figures.curves({run.name: run})))
    _casts(page, run)
    if run.plan:
        page.add("Plan", plan_table(run.plan))
    return page


def _casts(page: Page, run: Run) -> None:
    figure = figures.casts(run.casts) if run.casts else None
    if figure is not None:
        page.add("Casts", page.figure(figure))


def quickstart_page(folder: Path) -> Page:
    """The main job: transfer, control, FP8, plan diff."""
    result, moved = read_json(folder / "result.json"), read_json(folder / "transfer.json")
    target, sp, proxy = result["target"], result["sp"], result["proxy"]
    page = Page("isoscale quickstart", f"lr {result['lr']:g} tuned at width {proxy['width']}, carried unchanged to "
                f"width {target['width']}; {result['seconds']:.0f} s")  # fmt: skip
    page.add("Result", table(["model", "width", "numerics", "lr", "validation loss, nats/token"], [
        ["u-muP proxy", proxy["width"], "fp32", result["lr"], Loss(proxy["loss"])],
        ["u-muP target", target["width"], "fp32", result["lr"], Loss(target["loss_fp32"])],
        ["u-muP target", target["width"], f"{target['recipe']} ({target['backend']})", result["lr"],
         Loss(target["loss_fp8"])],
        ["SP proxy (control)", proxy["width"], "fp32", sp["lr"], Loss(sp["proxy_loss"])],
        ["SP target, LR carried over", target["width"], "fp32", sp["lr"], Loss(sp["target_loss"])],
        ["SP target, best LR tried", target["width"], "fp32", sp["target_best_lr"], Loss(sp["target_best_loss"])],
    ]), f"<p>FP8 gap: {float(target['fp8_gap']):+.4f} nats/token. Backend: {escape(target['backend'])}.</p>",
        *(f"<p class='warn'>{escape(text)}</p>" for text in result["warnings"]))  # fmt: skip
    ours = {f"u-muP width {proxy['width']}": _floats(proxy["losses"]),
            f"u-muP width {target['width']} (transferred)": {result["lr"]: float(target["loss_fp32"])}}  # fmt: skip
    theirs = {f"SP width {proxy['width']}": _floats(sp["losses"]),
              f"SP width {target['width']}": _floats(sp["target_losses"])}  # fmt: skip
    axis = "learning rate (base units)"
    page.add("Loss against learning rate",
             page.figure(figures.lines(ours, "u-muP: tuned on the proxy, carried over unchanged", axis)),
             page.figure(figures.lines(theirs, "SP, the control: treated in the same way", axis)))  # fmt: skip
    runs = {label: read_run(folder / "target" / name) for label, name in
            (("u-muP fp32", "fp32"), ("u-muP fp8", "fp8"), ("SP, LR carried over", "sp_0"))}  # fmt: skip
    page.add("Loss curves of the targets", page.figure(figures.curves(runs)))
    _casts(page, runs["u-muP fp8"])
    page.add("Plan diff, proxy to target", table(
        ["tensor", "quantity", "proxy", "target", "why"],
        [[c["name"], c["quantity"], shown(c["left"]), shown(c["right"]), c["reason"]] for c in moved["changes"]],
    ))  # fmt: skip
    if plan := runs["u-muP fp8"].plan:
        page.add("Every tensor of the target", plan_table(plan))
    return page


def _floats(line: Mapping[str, float]) -> dict[float, float]:
    return {float(lr): float(loss) for lr, loss in line.items()}


def write_report(folder: Path | str, out: Path | None = None, *, beside: Sequence[Path | str] = ()) -> Path:
    """Write the page of a run, sweep or quickstart folder.

    Args:
        folder: what isoscale made.
        out: where to; by default `report.html` inside the folder.
        beside: other sweeps to compare a sweep with (sizes, strategies).

    Raises:
        CheckpointError: no such folder, or nothing in it to report on.
        MissingDependencyError: plotly is not installed.
        StorageError: the page cannot be written.
    """
    folder = Path(folder)
    others = [Path(other) for other in beside]
    for place in (folder, *others):
        if not place.is_dir():
            raise CheckpointError("no such folder", key="DIR", value=str(place))
    need("plotly", "report")
    kinds = {str(place): kind_of(place) for place in (folder, *others)}
    if others and set(kinds.values()) != {"sweep"}:
        wrong = next(place for place, kind in kinds.items() if kind != "sweep")
        raise CheckpointError("only sweeps can be compared on one page", key="DIR", value=wrong,
                              hint="one folder at a time")  # fmt: skip
    kind = kinds[str(folder)]
    if kind == "sweep":
        page = sweep_page(folder, others)
    else:
        page = quickstart_page(folder) if kind == "quickstart" else run_page(folder)
    path = out or folder / "report.html"
    atomic_write(path, page.html())
    return path
