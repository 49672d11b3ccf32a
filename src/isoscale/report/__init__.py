"""Run folders -> plots and one static HTML page. Reads files, runs nothing."""

from isoscale.report.page import write_report

__all__ = ["write_report"]
