"""Does this model transfer? A coordinate check over width and depth, and an LR sweep, for any model."""

from isoscale.check.fit import cost_of, optimum
from isoscale.check.judge import Finding, Suspect, Trend
from isoscale.check.run import CheckResult, Status, run_check
from isoscale.check.settings import CheckSettings
from isoscale.check.transfer import Transfer

__all__ = [
    "CheckResult", "CheckSettings", "Finding", "Status", "Suspect", "Transfer", "Trend", "cost_of", "optimum",
    "run_check",
]  # fmt: skip
