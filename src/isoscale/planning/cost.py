"""What a run costs before it starts: parameters, FLOPs, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from isoscale.formats import BlockFormat, by_name
from isoscale.planning.rows import ParamRow


@dataclass(frozen=True)
class Cost:
    """Sizes of a model and of one training token.

    Args:
        parameters: count, each shared tensor once.
        matmul_parameters: those that take part in a matmul (embeddings look up, they do not multiply).
        flops_per_token: forward + backward, 6 x matmul parameters + 6 x depth x width x seq_len (causal attention).
        weight_bytes: fp32 master weights.
        state_bytes: weights, gradients and the optimiser's state: AdamW's two moments, LMD's medians and momenta.
        low_precision_share: share of the linear FLOPs, forward and backward, whose two operands are cast below 16 bits.
        weight_bits: mean bits per weight value, shares of block scales included, as the forward's matmuls see it.
    """

    parameters: int
    matmul_parameters: int
    flops_per_token: float
    weight_bytes: int
    state_bytes: int
    low_precision_share: float
    weight_bits: float


def bits_per_value(name: str) -> float:
    """Bits that a value of a format takes, with its share of the block's scale.

    Raises:
        ConfigError: no such format.
    """
    fmt = by_name(name)
    return fmt.bits_per_value() if isinstance(fmt, BlockFormat) else float(fmt.bits)


def cost(
    rows: Sequence[ParamRow], *, width: int, depth: int, seq_len: int, active: float = 1.0, lmd_bytes: int = 16
) -> Cost:
    """The cost of a model by its rows; a tied embedding counts as a matmul too.

    Args:
        rows: a plan's parameter rows.
        width: model width, features.
        depth: blocks.
        seq_len: tokens per sequence.
        active: share of the experts that a token goes through; experts are weights of three dimensions.
        lmd_bytes: state of a weight that LMD trains: two medians and two momenta, fp32; less in its other forms.
    """
    count = {row.name: prod(row.shape) for row in rows}
    tied = not any(row.role == "readout" for row in rows)
    matmul = [row for row in rows if len(row.shape) > 1 and (row.role != "embedding" or tied)]
    linear = sum(count[row.name] for row in matmul)
    used = sum(count[row.name] * (active if len(row.shape) == 3 and row.role == "hidden" else 1.0) for row in matmul)
    low = sum(
        count[row.name] / 3
        for row in matmul
        for pair in row.formats.passes.values()
        if max(map(bits_per_value, pair)) < 16
    )
    bits = sum(count[row.name] * bits_per_value(row.formats.weight) for row in matmul)
    total = sum(count.values())
    return Cost(
        parameters=total,
        matmul_parameters=linear,
        flops_per_token=6.0 * used + 6.0 * depth * width * seq_len,
        weight_bytes=4 * total,
        state_bytes=sum(count[row.name] * (8 + (lmd_bytes if row.optimizer == "lmd" else 8)) for row in rows),
        low_precision_share=low / linear if linear else 0.0,
        weight_bits=bits / linear if linear else 0.0,
    )
