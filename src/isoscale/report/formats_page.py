"""A page about formats on a checkpoint: the histogram of each tensor's magnitudes, the ranges of formats under it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isoscale._base.files import atomic_write
from isoscale._base.optional import need
from isoscale.report.document import Page, table
from isoscale.report.figures import COLOURS

MOST = 60


def histogram(row: Mapping[str, Any]) -> Any:
    """Counts of magnitudes in log2 bins above, and under it one bar for each format: faint where it is subnormal."""
    make = need("plotly.subplots", "report").make_subplots
    losses = list(reversed(row["losses"]))
    figure = make(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.04, row_heights=[0.42, 0.58])
    bins = sorted((int(exponent), count) for exponent, count in row["histogram"].items())
    total = max(1, math.prod(row["shape"]))
    figure.add_bar(
        x=[e + 0.5 for e, _ in bins], y=[count / total for _, count in bins], width=1.0, marker={"color": "#94a3b8"},
        hovertemplate="2^%{x}: %{y:.3%}<extra></extra>", row=1, col=1,
    )  # fmt: skip
    names = [f"{loss['format']}, {loss['sqnr_db']:.1f} dB" for loss in losses]
    colours = [COLOURS[2] if loss["format"] == row["format"] else COLOURS[0] for loss in losses]
    for start, end, opacity, word in (("low", "normal", 0.35, "subnormal"), ("normal", "high", 1.0, "normal")):
        figure.add_bar(y=names, base=[loss[start] for loss in losses], x=[loss[end] - loss[start] for loss in losses],
                       orientation="h", marker={"color": colours, "opacity": opacity}, name=word,
                       hovertemplate=f"%{{y}}, {word}<extra></extra>", row=2, col=1)  # fmt: skip
    edges = [e for e, _ in bins] + [e + 1 for e, _ in bins] + [loss["high"] for loss in losses]
    low = min([e for e, _ in bins] + [loss["low"] for loss in losses]) if bins else -20
    top = max(edges, default=1)
    figure.update_xaxes(range=[max(low, top - 48) - 1, top + 1])
    figure.update_xaxes(title="log2 of the magnitude", row=2, col=1)
    figure.update_yaxes(title="share of values", tickformat=".0%", row=1, col=1)
    figure.update_yaxes(automargin=True, row=2, col=1)
    figure.update_layout(template="plotly_white", showlegend=False, barmode="overlay", bargap=0.25,
                         height=230 + 23 * len(losses), margin={"l": 60, "r": 20, "t": 10, "b": 45})  # fmt: skip
    return figure


def write_formats_page(
    tensors: Sequence[Mapping[str, Any]], skipped: Mapping[str, str], note: str, out: Path
) -> None:
    """Writes the page.

    Args:
        tensors: one mapping per tensor: `name`, `shape`, `dtype`, `format` (the recommended), `losses` (format, bits,
            sqnr_db, clipped, flushed; low, normal and high as log2), `histogram` (log2 bin -> count), `zeros`,
            `special`.
        skipped: name -> why.
        note: what was measured, under the title.
        out: the file.

    Raises:
        MissingDependencyError: plotly is not installed.
        StorageError: the page cannot be written.
    """
    need("plotly", "report")
    page = Page("Formats", note)
    head = ["tensor", "shape", "dtype", "recommended", "bits", "SQNR, dB", "zeros", "inf or NaN"]
    rows = []
    for row in tensors:
        best = next((loss for loss in row["losses"] if loss["format"] == row["format"]), None)
        rows.append([row["name"], "x".join(map(str, row["shape"])) or "scalar", row["dtype"], row["format"] or "none",
                     best["bits"] if best else "-", round(best["sqnr_db"], 1) if best else "-", row["zeros"],
                     row["special"]])  # fmt: skip
    page.add("Tensors", table(head, rows))
    if skipped:
        page.add("Skipped", table(["tensor", "why"], list(skipped.items())))
    page.parts.append(
        "<p class='note'>Pictures: grey, the magnitudes of the values; under them what each format can hold in the "
        "block of the largest magnitude (faint: subnormal; green: recommended). Other blocks reach further down."
        + (f" The {MOST} largest of {len(tensors)} tensors." if len(tensors) > MOST else "") + "</p>"
    )  # fmt: skip
    shown = sorted(tensors, key=lambda row: -math.prod(row["shape"]))[:MOST]
    for row in (row for row in tensors if any(row is other for other in shown)):
        lines = [[loss["format"], loss["bits"], loss["sqnr_db"], f"{loss['clipped']:.2%}", f"{loss['flushed']:.2%}"]
                 for loss in row["losses"]]  # fmt: skip
        detail = table(["format", "bits", "SQNR, dB", "clipped", "flushed"], lines)
        page.add(row["name"], page.figure(histogram(row)), f"<details><summary>numbers</summary>{detail}</details>")
    atomic_write(out, page.html())
