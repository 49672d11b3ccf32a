"""Casts on a GPU by Triton kernels."""

from __future__ import annotations

from isoscale.kernels.spec import CastSpec


def available() -> bool:
    """Whether the Triton kernels can be used."""
    return False


def covers(spec: CastSpec, strided: bool) -> bool:
    """Whether the Triton kernels can do such a cast."""
    return False
