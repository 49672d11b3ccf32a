"""The errors a user may see, each with the four things that help: key, value, place, hint.

A refusal is only useful if it names what was wrong, where it was set, and what to write instead. Every error that
isoscale raises on purpose is an `IsoscaleError`; the command line prints it on one screen and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class IsoscaleError(Exception):
    """A refusal in words.

    Args:
        message: what is wrong, one sentence.
        key: the setting, tensor or file at fault.
        value: the offending value, shown with `repr`.
        place: where it was set (a file, a flag, a module path).
        hint: what to do about it.
    """

    def __init__(
        self, message: str, *, key: str = "", value: object = None, place: str = "", hint: str = ""
    ) -> None:
        super().__init__(message)
        self.message, self.key, self.value, self.place, self.hint = message, key, value, place, hint

    def __str__(self) -> str:
        lines = [self.message]
        if self.key:
            lines.append(f"  key:   {self.key}")
        if self.value is not None:
            lines.append(f"  value: {self.value!r}")
        if self.place:
            lines.append(f"  where: {self.place}")
        if self.hint:
            lines.append(f"  try:   {self.hint}")
        return "\n".join(lines)


class ConfigError(IsoscaleError):
    """A setting is unknown, of the wrong type, out of range, or at odds with another one."""


class PlanError(IsoscaleError):
    """A model and a parametrisation do not fit: no role, no rule, a mismatch of sizes, a factor applied twice."""


class DataError(IsoscaleError):
    """Text or tokens that cannot be trained on."""


class CheckpointError(IsoscaleError):
    """A checkpoint or run folder that is missing, damaged, or belongs to another run."""


class NonFiniteError(IsoscaleError):
    """A loss, gradient or weight stopped being a number."""


class StorageError(IsoscaleError):
    """The disk is full, read-only, or otherwise refuses."""


class MissingDependencyError(IsoscaleError):
    """An optional package is needed and not installed."""


class ManyErrors(IsoscaleError):
    """Several refusals at once, so that a user fixes a file in one go.

    Args:
        errors: the single refusals, in the order found.
        title: the headline; by default it counts them.
    """

    def __init__(self, errors: Sequence[IsoscaleError], title: str = "") -> None:
        super().__init__(title or f"{len(errors)} problems")
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join([self.message, *(str(error) for error in self.errors)])


def nearest(name: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The choices closest in spelling to `name`, best first; empty when none is close."""
    lowered = {choice.lower(): choice for choice in choices}
    hits = difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)
    return [lowered[hit] for hit in sorted(hits, key=lambda hit: not hit.startswith(name.lower()))]  # adam: adamw first


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest choices, or all of them when none is near."""
    every = list(choices)
    close = nearest(name, every)
    return f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(every)}"
