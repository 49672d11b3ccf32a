"""The unit-scaling factors as plain arithmetic: no tensors, no state.

Sources: Unit Scaling, arXiv 2303.11257 (Table A.2); u-muP, arXiv 2407.17465 (sections 4 and B: interpolated factors of
the nonlinearities, residual rule of section G). Non-linear ops have no closed form, so their factor is interpolated on
a log scale between two limits in which it is known: the near-linear one (mult -> 0) and the hard one (mult -> inf).
Arguments that are sizes may be symbolic integers under torch.compile(dynamic=True); those formulas use powers only,
the one form of arithmetic that Dynamo traces without specialising.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from isoscale._base.errors import ConfigError
from isoscale.nn.constraints import apply_constraint, log_interpolation

RELU_STD = math.sqrt(2 / (1 - 1 / math.pi))  # 1 / std(relu(z)), z ~ N(0, 1)


@dataclass(frozen=True)
class Factors:
    """The factors that one op uses.

    Attributes:
        forward: of the output.
        input_grad: of the input gradient.
        weight_grad: of the parameter gradients; None while the token count is unknown, 1 where no rows are summed.
    """

    forward: float
    input_grad: float
    weight_grad: float | None = None


def token_scale(tokens: int | None, rows: int) -> float:
    """`T^-1/2` for a weight gradient that sums over T rows: `tokens` if known, else the local `rows` (at least 1)."""
    count = tokens if tokens is not None else (rows or 1)
    factor: float = count**-0.5
    return factor


def check_mult(mult: float, name: str = "mult") -> float:
    """Return `mult`, a finite positive number; raise `ConfigError` otherwise."""
    if not mult > 0 or mult == math.inf:
        raise ConfigError("a multiplier must be a positive, finite number", key=name, value=mult)
    return mult


def gelu_factors(mult: float, constraint: str | None) -> tuple[float, float]:
    """Output and input-gradient factor of `gelu(mult x) / mult`."""
    weight = 1 / (1 + 0.25 / check_mult(mult) ** 2)
    forward = log_interpolation(weight, 2.0, RELU_STD)
    return _pair(constraint, forward, log_interpolation(weight, 2.0, math.sqrt(2)))


def silu_factors(mult: float, constraint: str | None) -> tuple[float, float]:
    """Output and input-gradient factor of `x * sigmoid(mult x)`."""
    forward = log_interpolation(1 / (1 + 0.25 / check_mult(mult) ** 2), 2.0, RELU_STD)
    return _pair(constraint, forward, log_interpolation(1 / (1 + 1 / mult**2), 2.0, math.sqrt(2)))


def silu_glu_factor(mult: float) -> float:
    """The one factor of `x * gate * sigmoid(mult gate)`: rms 1/2 in the flat limit, 1/sqrt(2) in the hard one."""
    return log_interpolation(1 / (1 + 1 / check_mult(mult) ** 2), 2.0, math.sqrt(2))


def gelu_glu_factor(mult: float) -> float:
    """The one factor of `x * gate * Phi(mult gate)` (GEGLU).

    Derived here, not in the papers. The limits are those of SwiGLU (gate/2 and relu(gate)). Phi(z) is about
    sigmoid(1.7 z), so GEGLU at `mult` is SwiGLU at about 1.7 mult and the interpolation weight `1/(1 + 1/mult^2)`
    becomes `1/(1 + 0.35/mult^2)`; 0.33 is the least-squares fit of the log rms over mult in {1/4 ... 4}, within 1 %.
    """
    return log_interpolation(1 / (1 + 0.33 / check_mult(mult) ** 2), 2.0, math.sqrt(2))


def softmax_factors(mult: float, size: int, constraint: str | None) -> tuple[float, float]:
    """Output and input-gradient factor of `softmax(mult x)` over `size` entries; from flat (1/n) to one-hot."""
    weight = 1 / (1 + 4 / check_mult(mult) ** 2)
    root: float = size**0.5
    forward = log_interpolation(weight, size, root)
    return _pair(constraint, forward, log_interpolation(weight, size / mult, root / mult**0.5))


def symbolic_log(size: int) -> float:
    """`ln(size)` from powers, since Dynamo specialises on logarithms of sizes: `(n^h - n^-h) / 2h`, h = 2^-10.

    One Richardson step takes the error to below 5e-9 (relative) for n <= 10^7, in double precision.
    """
    h = 2.0**-10
    wide = (size ** (2 * h) - size ** (-2 * h)) / (4 * h)
    narrow = (size**h - size**-h) / (2 * h)
    value: float = (4 * narrow - wide) / 3
    return value


def attention_factor(
    mult: float,
    head_size: int,
    length: int,
    causal: bool,
    dropout_p: float = 0.0,
    log: Callable[[int], float] = math.log,
) -> float:
    """The one factor of scaled-dot-product attention, on the output and on the gradients of q, k and v.

    `sqrt(1-p) / LI(w; sqrt(c/n), 1)` with `w = 1/(1 + 4 head_size/mult^2)`, `c = ln n` if causal else 1. A query that
    sees one key returns that value unchanged, so length 1 gives exactly `sqrt(1-p)`.

    Args:
        mult: logits are `mult / head_size * q.k`.
        head_size: size of a head.
        length: number of keys; may be symbolic.
        causal: whether position i sees keys 0..i only.
        dropout_p: dropout on the attention weights.
        log: the logarithm to use; `symbolic_log` under torch.compile.
    """
    keep = math.sqrt(1 - dropout_p)
    if length == 1:
        return keep
    weight = 1 / (1 + 4 * head_size / mult**2) if mult else 0.0
    spread = length / log(length) if causal else length
    factor: float = keep * spread ** ((1 - weight) / 2)
    return factor


def residual_scales(tau: float) -> tuple[float, float]:
    """`(tau, 1) / sqrt(1 + tau^2)`: the factor of the branch and that of the skip (u-muP, section 1.3 rule)."""
    norm = math.sqrt(1 + tau * tau)
    return tau / norm, 1 / norm


def transformer_residual_rule(
    residual_mult: float = 1.0, residual_attn_ratio: float = 1.0, share: float | None = None
) -> Callable[[int, int], float]:
    """The u-muP residual rule as a function `(branch index, number of branches) -> tau` (arXiv 2407.17465, eq. 20 ff.).

    It is x + w f(x) with w^2 = alpha^2 share, brought back to unit variance after every add: tau is w over the
    stream's standard deviation so far.

    Args:
        residual_mult: alpha_res, weight of all branches against the embedding.
        residual_attn_ratio: alpha_res-attn-ratio, weight of attention branches against FFN branches.
        share: variance that a block adds at alpha_res 1, per branch; by default 1 / blocks, as in the paper.

    Raises:
        ConfigError: a negative or non-finite argument, an odd number of branches, an index out of range.
    """
    for name, value in (("residual_mult", residual_mult), ("residual_attn_ratio", residual_attn_ratio)):
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError("must be a finite number >= 0", key=name, value=value)
    ffn_squared = residual_mult**2 * 2 / (1 + residual_attn_ratio**2)
    attn_squared = residual_attn_ratio**2 * ffn_squared

    def tau(index: int, branches: int) -> float:
        if branches < 2 or branches % 2:
            raise ConfigError("branches alternate attention and FFN, so their number is even", value=branches)
        if not 0 <= index < branches:
            raise ConfigError("branch index out of range", value=index, hint=f"0 to {branches - 1}")
        own = attn_squared if index % 2 == 0 else ffn_squared
        before = (index + 1) // 2 * attn_squared + index // 2 * ffn_squared
        return math.sqrt(own / ((branches / 2 if share is None else 1 / share) + before))

    return tau


def transformer_residual_taus(
    branches: int, residual_mult: float = 1.0, residual_attn_ratio: float = 1.0, share: float | None = None
) -> tuple[float, ...]:
    """All taus of a stack of `branches` = 2 * blocks residual branches, attention first. See the rule above."""
    rule = transformer_residual_rule(residual_mult, residual_attn_ratio, share)
    return tuple(rule(index, branches) for index in range(branches))


def linear_factors(
    fan_in: int, fan_out: int, constraint: str | None, scale_power: tuple[float, float] = (0.5, 0.5)
) -> tuple[float, float]:
    """Output factor `fan_in^-p0` and input-gradient factor `fan_out^-p1`, merged under `constraint`."""
    return _pair(constraint, fan_in ** -scale_power[0], fan_out ** -scale_power[1])


def _pair(constraint: str | None, forward: float, backward: float) -> tuple[float, float]:
    first, second = apply_constraint(constraint, forward, backward)
    return first, second
