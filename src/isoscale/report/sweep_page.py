"""The page of a sweep, alone or beside others: what won, how sure that is, what matters, what interacts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isoscale.config.hps import parse_key
from isoscale.report import analysis, figures, sweep_figures
from isoscale.report.document import Loss, Page, plan_table, shown, table
from isoscale.report.load import Run, read_json, read_sweep

CURVES = 12  # runs whose curves are drawn
TABLED = 400  # trials that are listed


def _label(trial: Mapping[str, Any], seeds: int) -> str:
    """A trial in a legend: its point, and its seed where there are several."""
    point = _point(trial["point"], figures.power)
    return f"{point}, seed {trial['seed']}" if seeds > 1 else point


def _point(point: Mapping[str, float], number: Any = shown) -> str:
    """A point in words; of one with many numbers only how many there are."""
    named = [f"{name} {number(value)}" for name, value in point.items()] or ["defaults"]
    return ", ".join(named) if len(named) <= 6 else ", ".join([*named[:3], f"... ({len(named)} numbers)"])


def _starts(folder: Path) -> dict[str, float]:
    """The config's value of every number."""
    config = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    return {**config.get("hps", {}), **config.get("modules", {})}


def _width(folder: Path) -> int:
    config = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    return int(config.get("model", {}).get("width", 0))


def sweep_page(folder: Path, beside: Sequence[Path] = ()) -> Page:
    """A sweep: its winner and how sure it is, lines, the best so far, what matters, what interacts, trials, plan."""
    sweep, runs = read_sweep(folder)
    starts = _starts(folder)
    note = f"best {_point(sweep['best'])}, validation loss {float(sweep['loss']):.4f} nats/token"
    page = Page(f"Sweep: {folder.name}", note)
    if sweep["edge"]:
        page.add("Warning", "<p class='warn'>The best LR lies at an end of the values tried.</p>")
    for text in sweep.get("warnings", ()):
        page.add("Warning", f"<p class='warn'>{text}</p>")
    _winners(page, sweep)
    all_of_them = {folder: sweep, **{other: read_sweep(other)[0] for other in beside}}
    _searches(page, all_of_them)
    _lines(page, all_of_them, folder, starts)
    _spent(page, all_of_them)
    _matters(page, sweep, starts)
    for (a, b), (rows, columns, loss) in analysis.grids(sweep).items():
        page.add(f"Interaction of {a} and {b}", page.figure(sweep_figures.heat(a, b, rows, columns, loss)))
    _factors(page, sweep)
    _trials(page, sweep, runs)
    return page


def _winners(page: Page, sweep: Mapping[str, Any]) -> None:
    rows = [[_point(one["point"]), Loss(one["mean"]), Loss(one["low"]), Loss(one["high"]), one["count"]]
            for one in analysis.contenders(sweep)]  # fmt: skip
    if rows:
        settled = "The best is told from the second." if sweep["confidence"]["settled"] else \
                  "The best cannot be told from the second by these seeds."  # fmt: skip
        page.add("The best points on fresh seeds", table(["point", "mean loss", "95 % from", "to", "seeds"], rows),
                 f"<p class='note'>{settled}</p>")  # fmt: skip


def _searches(page: Page, sweeps: Mapping[Path, Mapping[str, Any]]) -> None:
    rows = [[place.name, sweep.get("search", {}).get("strategy", ""), _width(place), len(sweep["trials"]),
             _point(sweep["best"]), Loss(sweep["loss"]), "fresh seeds" if sweep.get("confidence") else "its own seed"]
            for place, sweep in sweeps.items()]  # fmt: skip
    if len(rows) > 1:
        note = "<p class='note'>What follows is of the first, where nothing else is said.</p>"
        head = ["folder", "strategy", "width", "runs", "best point", "loss", "measured on"]
        page.add("The searches", table(head, rows), note)


def _lines(
    page: Page, sweeps: Mapping[Path, Mapping[str, Any]], folder: Path, starts: Mapping[str, float]
) -> None:  # fmt: skip
    drawn: dict[str, dict[float, float]] = {}
    best: dict[int, float] = {}
    for place, sweep in sweeps.items():
        line = analysis.lines(sweep).get("lr", {})
        if len(line) > 1:
            drawn[f"width {_width(place)}" + (f", {place.name}" if len(sweeps) > 1 else "")] = line
            best[_width(place)] = min(line.items(), key=lambda pair: pair[1])[0]
    if drawn:
        page.add("Loss against learning rate", page.figure(figures.lines(drawn, "", "learning rate (base units)")))
    for name, line in analysis.lines(sweeps[folder], starts).items():
        if name != "lr" and len(line) > 1:
            page.add(f"Loss against {name}", page.figure(figures.lines({name: line}, "", f"{name} (base units)")))
    if len(best) > 1:
        page.add("Optimum against size", page.figure(sweep_figures.optimum_against_size(best, "learning rate")))


def _spent(page: Page, sweeps: Mapping[Path, Mapping[str, Any]]) -> None:
    named = {}
    for place, sweep in sweeps.items():
        label = f"{sweep['search']['strategy']} ({place.name})" if "search" in sweep else place.name
        named[label] = analysis.best_so_far(sweep)
    if any(len(cost) > 2 and cost[-1] > 0 for cost, _ in named.values()):
        page.add("Best so far against what was spent", page.figure(sweep_figures.best_so_far(named)))


def _matters(page: Page, sweep: Mapping[str, Any], starts: Mapping[str, float]) -> None:
    found = analysis.importance(sweep, starts) if "search" in sweep else {}
    if found:
        note = "<p class='note'>Share of each number in what tells the best quarter of the points from the rest " \
               "(PED-ANOVA). With fewer than some ten points per number this is a hint, no proof.</p>"  # fmt: skip
        page.add("Which hyperparameters matter", page.figure(sweep_figures.bars(found, "share")), note)
        groups: dict[str, float] = {}
        for name, share in found.items():
            key = parse_key(name)
            group = name if key is None else f"{key.hp} by depth" if not key.type else f"{key.hp} by type"
            groups[group] = groups.get(group, 0.0) + share
        if len(groups) < len(found):
            page.add("The same by hyperparameter", page.figure(sweep_figures.bars(groups, "share")))
    if len(points := analysis.points(sweep)) >= 8 and len({n for p in points for n, _ in p}) >= 2:
        names = sorted({n for p in points for n, _ in p}, key=lambda n: -found.get(n, 0.0))
        page.add("Parallel coordinates", page.figure(sweep_figures.parallel(points, names, starts)),
                 "<p class='note'>log2 of each value; the better three quarters of the points.</p>")  # fmt: skip


def _factors(page: Page, sweep: Mapping[str, Any]) -> None:
    """The winner's factors: module types and depths down, hyperparameters across."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in sweep["best"].items():
        if (key := parse_key(name)) is not None:
            at = "" if key.depth is None else f"l/L = {key.depth:g}"
            rows.setdefault(" ".join(part for part in (key.type, at) if part), {})[key.hp] = value
    if rows:
        hps = list(dict.fromkeys(hp for found in rows.values() for hp in found))
        body = [[label, *(f"{found[hp]:.3g}" if hp in found else "1" for hp in hps)]
                for label, found in sorted(rows.items())]  # fmt: skip
        page.add("The winner's factors", table(["module type, depth", *hps], body))


def _trials(page: Page, sweep: Mapping[str, Any], runs: Sequence[Run]) -> None:
    done = {trial["id"]: trial for trial in sweep["trials"]}
    seeds = len({trial["seed"] for trial in sweep["trials"]})
    runs = sorted(runs, key=lambda run: (sorted(done[run.path.name]["point"].items()), done[run.path.name]["seed"]))
    best = sorted(runs, key=lambda run: run.loss if math.isfinite(run.loss) else math.inf)[:CURVES]
    drawn = [run for run in runs if run in best]
    if drawn:
        heading = "Curves" if len(drawn) == len(runs) else f"Curves of the best {len(drawn)}"
        page.add(heading, page.figure(figures.curves({_label(done[run.path.name], seeds): run for run in drawn})))
    trials = sorted(sweep["trials"], key=lambda trial: (sorted(trial["point"].items()), trial["seed"]))
    if len(trials) > TABLED:
        trials.sort(key=lambda trial: float(trial["loss"]) if trial["state"] == "done" else math.inf)
        trials = trials[:TABLED]
    rows = [[_point(t["point"]), t["seed"], t["state"], Loss(t["loss"]), round(float(t["seconds"]), 1), t["attempts"]]
            for t in trials]  # fmt: skip
    page.add("Trials", table(["point", "seed", "state", "loss", "seconds", "attempts"], rows))
    if failed := [[t["id"], t["error"]] for t in sweep["trials"] if t.get("error")]:
        page.add("What failed", table(["trial", "why"], failed[:50]))
    winner = next((run for run in runs if done[run.path.name]["point"] == sweep["best"]), None)
    if winner is not None and winner.plan:
        page.add("The winner's plan", plan_table(winner.plan))
