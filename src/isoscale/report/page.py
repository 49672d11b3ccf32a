"""One self-contained HTML page: no server, no network, opens from disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from isoscale._base.errors import CheckpointError
from isoscale._base.files import atomic_write
from isoscale._base.optional import need
from isoscale.report import figures
from isoscale.report.load import Run, kind_of, read_json, read_run, read_sweep

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1120px;margin:2rem auto;padding:0 1rem;color:#1f2937}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #e5e7eb}
table{border-collapse:collapse;font-size:13px;margin:.6rem 0}
td,th{padding:.22rem .7rem;border-bottom:1px solid #eee;white-space:nowrap}
td.w{white-space:normal;min-width:12rem;overflow-wrap:anywhere}
th{text-align:left;background:#f8fafc}td.n{text-align:right;font-variant-numeric:tabular-nums}
code,.mono{font-family:ui-monospace,monospace;font-size:12.5px}.note{color:#6b7280}.warn{color:#b45309}
th.n{text-align:right}.scroll{overflow-x:auto;max-height:620px;overflow-y:auto}
"""


def _cell(value: Any) -> str:
    if isinstance(value, Loss):
        return f'<td class="n">{value:.4f}</td>' if math.isfinite(value) else '<td class="n">diverged</td>'
    if isinstance(value, float):
        return f'<td class="n">{value:.4g}</td>'
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    text = str(value)
    return f"<td class='w'>{escape(text)}</td>" if len(text) > 40 else f"<td>{escape(text)}</td>"


class Loss(float):
    """A loss, shown with four decimals; one that is no finite number reads `diverged`."""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table."""
    rows = [list(row) for row in rows]
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    right = [bool(rows) and isinstance(rows[0][i], int | float) for i in range(len(head))]
    top = "".join(f"<th{' class=n' if number else ''}>{escape(h)}</th>" for h, number in zip(head, right))
    return f"<div class='scroll'><table><tr>{top}</tr>{body}</table></div>"


class Page:
    """Collects sections; plotly's script goes in once."""

    def __init__(self, title: str, note: str) -> None:
        self.parts = [f"<h1>{escape(title)}</h1><p class='note'>{escape(note)}</p>"]
        self.title, self.scripted = title, False

    def add(self, heading: str, *html: str) -> None:
        """A section."""
        self.parts.append(f"<h2>{escape(heading)}</h2>" + "".join(html))

    def figure(self, figure: Any) -> str:
        """A figure as HTML."""
        config = {"displayModeBar": False, "responsive": True}
        html: str = figure.to_html(full_html=False, include_plotlyjs=not self.scripted, config=config)
        self.scripted = True
        return html

    def html(self) -> str:
        """The document."""
        return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(self.title)}</title>"
                f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head>"
                f"<body>{''.join(self.parts)}</body></html>")  # fmt: skip


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        items = value if len(value) <= 4 else [value[0], "...", value[-1]]
        return " x ".join(_shown(item) for item in items) if all(isinstance(v, int) for v in value) else \
               ", ".join(_shown(item) for item in items)  # fmt: skip
    return str(value)


def _formats(formats: Mapping[str, Any]) -> str:
    """Operands and their formats, and how they are treated; one word where nothing is cast."""
    if all(value == "fp32" for value in formats.values()):
        return "fp32"
    return ", ".join(f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in formats.items())


def plan_table(plan: Mapping[str, Any]) -> str:
    """Parameter rows of a plan: role, shape, init, LR, decay, formats, and what the LR is made of."""
    rows = [
        [row["name"], row["role"], "x".join(map(str, row["shape"])), row["factors"]["forward"], row["init_std"],
         row["lr"], row["weight_decay"], _formats(row["formats"]),
         row["reasons"]["lr"].partition(" = ")[2] or row["reasons"]["lr"]]
        for row in plan["rows"]
    ]  # fmt: skip
    return table(["parameter", "role", "shape", "forward", "init std", "LR", "decay", "formats", "this LR is"], rows)


def _lr_line(sweep: Mapping[str, Any]) -> dict[float, float]:
    groups: dict[float, list[float]] = {}
    for trial in sweep["trials"]:
        if trial["state"] == "done" and set(trial["point"]) == {"lr"} and not trial.get("confirm"):
            groups.setdefault(trial["point"]["lr"], []).append(float(trial["loss"]))
    return {lr: sum(losses) / len(losses) for lr, losses in groups.items()}


def _other_lines(sweep: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    losses: dict[str, dict[float, list[float]]] = {}
    for trial in sweep["trials"]:
        others = [name for name in trial["point"] if name != "lr"]
        if trial["state"] == "done" and len(others) == 1:
            name = others[0]
            losses.setdefault(name, {}).setdefault(trial["point"][name], []).append(float(trial["loss"]))
    return {name: {value: sum(found) / len(found) for value, found in line.items()} for name, line in losses.items()}


def _label(trial: Mapping[str, Any], seeds: int) -> str:
    """A trial in a legend: its point, and its seed where there are several."""
    point = ", ".join(f"{name} {figures.power(value)}" for name, value in trial["point"].items())
    return f"{point}, seed {trial['seed']}" if seeds > 1 else point


def sweep_page(folder: Path) -> Page:
    """A sweep: loss against LR and every other HP, the trials, the best run's plan."""
    sweep, runs = read_sweep(folder)
    best = _shown(sweep["best"])
    page = Page(f"Sweep: {folder.name}", f"best {best}, validation loss {float(sweep['loss']):.4f} nats/token")
    if sweep["edge"]:
        page.add("Warning", "<p class='warn'>The best LR lies at an end of the values tried.</p>")
    if line := _lr_line(sweep):
        width = runs[0].config["model"]["width"] if runs else 0
        page.add("Loss against learning rate",
                 page.figure(figures.lines({f"width {width}": line}, "", "learning rate (base units)")))  # fmt: skip
    for name, line in _other_lines(sweep).items():
        page.add(f"Loss against {name}", page.figure(figures.lines({name: line}, "", f"{name} (base units)")))
    done = {trial["id"]: trial for trial in sweep["trials"]}
    seeds = len({trial["seed"] for trial in sweep["trials"]})
    runs = sorted(runs, key=lambda run: (sorted(done[run.path.name]["point"].items()), done[run.path.name]["seed"]))
    page.add("Curves", page.figure(figures.curves({_label(done[run.path.name], seeds): run for run in runs})))
    trials = sorted(sweep["trials"], key=lambda trial: (sorted(trial["point"].items()), trial["seed"]))
    rows = [[_shown(t["point"]), t["seed"], t["state"], Loss(t["loss"]), round(t["seconds"], 1), t["attempts"]]
            for t in trials]  # fmt: skip
    page.add("Trials", table(["point", "seed", "state", "loss", "seconds", "attempts"], rows))
    winner = next((run for run in runs if done[run.path.name]["point"] == sweep["best"]), None)
    if winner is not None and winner.plan:
        page.add("The winner's plan", plan_table(winner.plan))
    return page


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
        [[c["name"], c["quantity"], _shown(c["left"]), _shown(c["right"]), c["reason"]] for c in moved["changes"]],
    ))  # fmt: skip
    if plan := runs["u-muP fp8"].plan:
        page.add("Every tensor of the target", plan_table(plan))
    return page


def _floats(line: Mapping[str, float]) -> dict[float, float]:
    return {float(lr): float(loss) for lr, loss in line.items()}


def write_report(folder: Path | str, out: Path | None = None) -> Path:
    """Write the page of a run, sweep or quickstart folder.

    Args:
        folder: what isoscale made.
        out: where to; by default `report.html` inside the folder.

    Raises:
        CheckpointError: no such folder, or nothing in it to report on.
        MissingDependencyError: plotly is not installed.
        StorageError: the page cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError("no such folder", key="DIR", value=str(folder))
    need("plotly", "report")
    page = {"quickstart": quickstart_page, "sweep": sweep_page, "run": run_page}[kind_of(folder)](folder)
    path = out or folder / "report.html"
    atomic_write(path, page.html())
    return path
