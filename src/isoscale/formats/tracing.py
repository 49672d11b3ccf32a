"""What the compiler is told about functions of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def compile_time_constant(function: F) -> F:
    """Marks a function whose result the compiler takes as a constant for given arguments.

    `torch.compiler.assume_constant_result` sets the same mark, but imports the compiler to do so: two seconds at every
    start of a program that may never compile anything. A test holds the two to the same effect.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
