"""Plotly figures: loss curves, loss against LR, clipped and flushed shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from isoscale._base.optional import need
from isoscale.report.load import Run

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")


def _figure(title: str, x: str, y: str) -> Any:
    go = need("plotly.graph_objects", "report")
    figure = go.Figure()
    figure.update_layout(
        title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", height=430,
        margin={"l": 60, "r": 20, "t": 50, "b": 50}, legend={"orientation": "h", "y": -0.2},
    )  # fmt: skip
    return figure


def _smooth(values: Sequence[float], span: int) -> list[float]:
    out, recent = [], 0.0
    for i, value in enumerate(values):
        weight = max(1 / (i + 1), 1 / span)
        recent += weight * (value - recent)
        out.append(recent)
    return out


def curves(runs: Mapping[str, Run], title: str = "Training loss (smoothed) and validation loss (points)") -> Any:
    """Loss against step for each labelled run."""
    figure = _figure(title, "step", "loss, nats per token")
    for i, (label, run) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        losses = _smooth([row["loss"] for row in run.train], 15)
        figure.add_scatter(x=[row["step"] + 1 for row in run.train], y=losses, name=label, mode="lines",
                           line={"color": colour, "width": 1.6})  # fmt: skip
        figure.add_scatter(x=[row["step"] for row in run.evals], y=[row["val_loss"] for row in run.evals],
                           name=f"{label}, validation", mode="markers", marker={"color": colour, "size": 8},
                           showlegend=False)  # fmt: skip
    finals = [run.loss for run in runs.values() if math.isfinite(run.loss)]
    if finals:
        figure.update_yaxes(range=[min(finals) - 0.1, max(max(finals) + 1.2, 3.4)])
    return figure


def lr_lines(lines: Mapping[str, Mapping[float, float]], title: str) -> Any:
    """Final loss against learning rate, one line per label (usually a width), the best point ringed."""
    figure = _figure(title, "learning rate (base units)", "validation loss, nats per token")
    figure.update_xaxes(type="log", dtick=math.log10(2), tickformat=".2~r")
    worst = 0.0
    ticks: set[float] = set()
    for i, (label, line) in enumerate(lines.items()):
        points = sorted((lr, loss) for lr, loss in line.items() if math.isfinite(loss))
        if not points:
            continue
        ticks |= {lr for lr, _ in points}
        worst = max(worst, max(loss for _, loss in points))
        colour = COLOURS[i % len(COLOURS)]
        figure.add_scatter(x=[lr for lr, _ in points], y=[loss for _, loss in points], name=label,
                           mode="lines+markers", line={"color": colour})  # fmt: skip
        lr, loss = min(points, key=lambda point: point[1])
        figure.add_scatter(x=[lr], y=[loss], mode="markers", showlegend=False, hovertext=f"best of {label}",
                           marker={"symbol": "circle-open", "size": 17, "color": colour, "line": {"width": 3}})  # fmt: skip
    figure.update_xaxes(tickvals=sorted(ticks), ticktext=[_power(lr) for lr in sorted(ticks)])
    return figure


def _power(value: float) -> str:
    exponent = math.log2(value)
    return f"2<sup>{round(exponent, 1):g}</sup>" if abs(exponent - round(exponent, 1)) < 1e-6 else f"{value:.3g}"


def casts(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Clipped and flushed share of every low-precision cast at the last evaluation."""
    figure = _figure("Share of values clipped or flushed to zero by the casts, last evaluation", "", "share")
    last = max(row["step"] for row in rows)
    final = [row for row in rows if row["step"] == last and row["format"] != "bf16"]
    labels = [f"{row['layer']} {row['operand']} {row['format']}" for row in final]
    for name, colour in (("clipped", COLOURS[1]), ("flushed", COLOURS[0])):
        figure.add_bar(x=labels, y=[row[name] for row in final], name=name, marker={"color": colour})
    figure.update_yaxes(tickformat=".2%", rangemode="tozero")
    figure.update_layout(barmode="group", height=520)
    return figure
