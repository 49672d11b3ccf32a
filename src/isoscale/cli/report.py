"""isoscale report: one static page about a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isoscale.cli.common import AsJson, emit


def report(
    folder: Annotated[Path, typer.Argument(help="A run, sweep, quickstart or check folder.", metavar="DIR")],
    beside: Annotated[list[Path] | None, typer.Argument(help="Other sweeps, to compare.", metavar="DIR...")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default DIR/report.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page: curves, loss against LR, transfer, plan, formats. No server, no network.

    \b
    Examples:
      isoscale report runs/quickstart
      isoscale report runs/sweep --out sweep.html
      isoscale report runs/w64 runs/w128 runs/w256
    """
    from isoscale.report import write_report
    from isoscale.report.check_page import write_check_page

    if (folder / "check.json").is_file():
        page = write_check_page(folder, out)
    else:
        page = write_report(folder, out, beside=beside or ())
    emit(as_json, {"report": str(page)}, f"wrote {page}")
