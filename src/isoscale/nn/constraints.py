"""Which factors of an op must agree, and on what value.

An op whose input gradient is later *added* to another path's gradient must use one factor for its output and for that
gradient, or the two paths change their balance. A constraint merges the factors into one; `None` keeps them apart,
which is sound for weight gradients and after the last residual add.
Source: Unit Scaling, arXiv 2303.11257 section 5; u-muP (arXiv 2407.17465) uses `to_output_scale` by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from isoscale._base.errors import ConfigError, did_you_mean


def float_power(base: float, exponent: float) -> float:
    """`base ** exponent`, typed as the (possibly symbolic) float it is."""
    power: float = base**exponent
    return power


def gmean(*factors: float) -> float:
    """Geometric mean."""
    product = 1.0
    for factor in factors:
        product = product * factor
    return float_power(product, 1 / len(factors))


def hmean(*factors: float) -> float:
    """Harmonic mean."""
    return len(factors) / sum(1 / factor for factor in factors)


def amean(*factors: float) -> float:
    """Arithmetic mean."""
    return sum(factors) / len(factors)


def to_output_scale(output: float, *grads: float) -> float:
    """The forward factor wins (the default everywhere)."""
    return output


def _arity(name: str, factors: tuple[float, ...], wanted: int) -> None:
    if len(factors) != wanted:
        raise ConfigError(
            f"constraint {name} needs an op with {wanted - 1} constrained input gradient(s), this one has "
            f"{len(factors) - 1}",
            key="constraint",
            value=name,
            hint="to_output_scale fits every op",
        )


def to_grad_input_scale(*factors: float) -> float:
    """The factor of the one input gradient wins. Ops with one constrained input only."""
    _arity("to_grad_input_scale", factors, 2)
    return factors[1]


def to_left_grad_scale(*factors: float) -> float:
    """The factor of the left operand's gradient wins. Ops with two operands only (matmul, add)."""
    _arity("to_left_grad_scale", factors, 3)
    return factors[1]


def to_right_grad_scale(*factors: float) -> float:
    """The factor of the right operand's gradient wins. Ops with two operands only (matmul, add)."""
    _arity("to_right_grad_scale", factors, 3)
    return factors[2]


CONSTRAINTS: Mapping[str, Callable[..., float]] = MappingProxyType(
    {
        "gmean": gmean,
        "hmean": hmean,
        "amean": amean,
        "to_output_scale": to_output_scale,
        "to_grad_input_scale": to_grad_input_scale,
        "to_left_grad_scale": to_left_grad_scale,
        "to_right_grad_scale": to_right_grad_scale,
    }
)


def check_constraint(name: str | None) -> str | None:
    """Return `name` if it is a constraint, `None` for `None`; raise `ConfigError` with the nearest names otherwise."""
    if name is None or name in CONSTRAINTS:
        return name
    raise ConfigError(
        "unknown constraint",
        key="constraint",
        value=name,
        hint=did_you_mean(str(name), CONSTRAINTS) + " (None keeps the factors apart)",
    )


def apply_constraint(name: str | None, *factors: float) -> tuple[float, ...]:
    """Merge `factors` (output first, then input gradients) under the constraint `name`.

    Args:
        name: a key of `CONSTRAINTS`, or None.
        factors: output factor, then one factor per constrained input gradient.

    Returns:
        As many factors as came in; all equal unless `name` is None.

    Raises:
        ConfigError: unknown name, or one that does not fit the number of inputs.
    """
    if check_constraint(name) is None:
        return factors
    assert name is not None
    return (CONSTRAINTS[name](*factors),) * len(factors)


def log_interpolation(weight: float, low: float, high: float) -> float:
    """`low` at weight 0, `high` at weight 1, a constant ratio per step between: `low^(1-weight) * high^weight`.

    In powers: Dynamo takes an exponential or a logarithm of a symbolic number for a constant.
    """
    value: float = low ** (1 - weight) * high**weight
    return value
