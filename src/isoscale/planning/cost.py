"""What a run costs before it starts: parameters, FLOPs, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from isoscale.planning.rows import ParamRow

_BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "e4m3": 8.0, "e5m2": 8.0}


@dataclass(frozen=True)
class Cost:
    """Sizes of a model and of one training token.

    Args:
        parameters: count, each shared tensor once.
        matmul_parameters: those that take part in a matmul (embeddings look up, they do not multiply).
        flops_per_token: forward + backward, 6 x matmul parameters + 6 x depth x width x seq_len (causal attention).
        weight_bytes: fp32 master weights.
        state_bytes: weights + gradients + AdamW's two moments, fp32.
        low_precision_share: share of the linear FLOPs whose operands are cast below 16 bits.
    """

    parameters: int
    matmul_parameters: int
    flops_per_token: float
    weight_bytes: int
    state_bytes: int
    low_precision_share: float


def cost(rows: Sequence[ParamRow], *, width: int, depth: int, seq_len: int) -> Cost:
    """The cost of a model by its rows; a tied embedding counts as a matmul too.

    Args:
        rows: a plan's parameter rows.
        width: model width, features.
        depth: blocks.
        seq_len: tokens per sequence.
    """
    count = {row.name: prod(row.shape) for row in rows}
    tied = not any(row.role == "readout" for row in rows)
    matmul = [row for row in rows if len(row.shape) > 1 and (row.role != "embedding" or tied)]
    linear = sum(count[row.name] for row in matmul)
    low = sum(count[row.name] for row in matmul if _BITS.get(row.formats.input, 8.0) < 16)
    total = sum(count.values())
    return Cost(
        parameters=total,
        matmul_parameters=linear,
        flops_per_token=6.0 * linear + 6.0 * depth * width * seq_len,
        weight_bytes=4 * total,
        state_bytes=16 * total,
        low_precision_share=low / linear if linear else 0.0,
    )
