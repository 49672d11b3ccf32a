"""Run folders -> plots and one static HTML page. Reads files, runs nothing."""

from isoscale.report.formats_page import write_formats_page
from isoscale.report.page import write_report

__all__ = ["write_formats_page", "write_report"]
