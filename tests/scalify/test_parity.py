"""Scale for scale the rules of the authors' package, but for the differences named here.

The golden file was written by benchmarks/parity_scalify.py from jax-scalify 0.1.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isoscale.scalify.rules
from isoscale.scalify import registry, scales
from isoscale.scalify.pair import Pair, value

aten = torch.ops.aten
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "scalify_parity.json").read_text())
ROWS: list[dict[str, Any]] = GOLDEN["rows"]
CONV = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

# Their primitive -> our operator and the arguments after the inputs.
OURS: dict[str, tuple[Any, Callable[[dict[str, Any]], tuple[Any, ...]]]] = {
    "add": (aten.add.Tensor, lambda p: ()),
    "add_any": (aten.add.Tensor, lambda p: ()),
    "sub": (aten.sub.Tensor, lambda p: ()),
    "mul": (aten.mul.Tensor, lambda p: ()),
    "div": (aten.div.Tensor, lambda p: ()),
    "max": (aten.maximum.default, lambda p: ()),
    "min": (aten.minimum.default, lambda p: ()),
    "relu": (aten.relu.default, lambda p: ()),
    "eq": (aten.eq.Tensor, lambda p: ()),
    "ne": (aten.ne.Tensor, lambda p: ()),
    "gt": (aten.gt.Tensor, lambda p: ()),
    "ge": (aten.ge.Tensor, lambda p: ()),
    "lt": (aten.lt.Tensor, lambda p: ()),
    "le": (aten.le.Tensor, lambda p: ()),
    "neg": (aten.neg.default, lambda p: ()),
    "abs": (aten.abs.default, lambda p: ()),
    "sign": (aten.sign.default, lambda p: ()),
    "exp": (aten.exp.default, lambda p: ()),
    "log": (aten.log.default, lambda p: ()),
    "sin": (aten.sin.default, lambda p: ()),
    "cos": (aten.cos.default, lambda p: ()),
    "sqrt": (aten.sqrt.default, lambda p: ()),
    "integer_pow": (aten.pow.Tensor_Scalar, lambda p: (p["y"],)),
    "rev": (aten.flip.default, lambda p: ([1],)),
    "reshape": (aten.view.default, lambda p: ([4, 2],)),
    "transpose": (aten.permute.default, lambda p: ([1, 0],)),
    "slice": (aten.slice.Tensor, lambda p: (1, 1, 3)),
    "broadcast_in_dim": (aten.expand.default, lambda p: ([3, 4],)),
    "stop_gradient": (aten.detach.default, lambda p: ()),
    "convert_element_type": (aten._to_copy.default, lambda p: ()),
    "pad": (aten.constant_pad_nd.default, lambda p: ([1, 2],)),
    "reduce_sum": (aten.sum.dim_IntList, lambda p: ([1],)),
    "reduce_sum_all": (aten.sum.default, lambda p: ()),
    "reduce_prod": (aten.prod.dim_int, lambda p: (1,)),
    "reduce_max": (aten.amax.default, lambda p: ([1],)),
    "reduce_min": (aten.amin.default, lambda p: ([1],)),
    "reduce_window_max": (aten.max_pool2d_with_indices.default, lambda p: ([2, 2], [2, 2])),
    "reduce_window_sum": (aten.avg_pool2d.default, lambda p: ([2, 2], [2, 2], [0, 0], False, True, 1)),
    "argmax": (aten.argmax.default, lambda p: (1,)),
    "argmin": (aten.argmin.default, lambda p: (1,)),
    "is_finite": (aten.isinf.default, lambda p: ()),
    "dot_general": (aten.mm.default, lambda p: ()),
    "conv_general_dilated": (aten.convolution.default, lambda p: (None, *CONV)),
    "concatenate": (aten.cat.default, lambda p: (1,)),
    "select_n": (aten.where.self, lambda p: ()),
    "softmax": (aten._softmax.default, lambda p: (1, False)),
    "log_softmax": (aten._log_softmax.default, lambda p: (1, False)),
    "mul_number": (aten.mul.Tensor, lambda p: (p["y"],)),
    "add_number": (aten.add.Tensor, lambda p: (p["y"],)),
}  # fmt: skip


def _is_odd(row: dict[str, Any]) -> bool:
    return math.log2(row["scales"][0]) % 2 == 1


def _rounds_up(row: dict[str, Any]) -> bool:
    """Whether the nearest power of two of the number is not the one below, and this shows in the result."""
    near, below = scales.split(row["params"]["y"])[1], scales.floor2(abs(row["params"]["y"]))
    return near != below and (row["op"] == "mul_number" or near > row["scales"][0])


# What differs on purpose: operator -> (in which rows the scale differs, why).
DIFFERENT: dict[str, tuple[Callable[[dict[str, Any]], bool], str]] = {
    "sqrt": (_is_odd, "the scale stays a power of two: an odd exponent goes into the data first"),
    "mul_number": (_rounds_up, "numbers split to the nearest power of two: rounded down, decay factors overflow fp16"),
    "add_number": (_rounds_up, "as mul_number"),
    "sin": (lambda row: row["scales"][0] < 1, "sin x is about x for small x: the scale follows, so that data stay near 1"),
    "conv_general_dilated": (lambda row: True, "root of the fan-in, as in a matrix product; theirs has none"),
    "reduce_window_sum": (lambda row: True, "root of the window, as in any other sum; theirs has none"),
    "log_softmax": (lambda row: True, "theirs is NaN with an infinite scale on this JAX"),
}


def theirs(row: dict[str, Any]) -> tuple[Tensor, float | None]:
    data = torch.tensor(row["data"])
    return data, row["scale"]


def ours(row: dict[str, Any], as_tensors: bool) -> Any:
    op, more = OURS[row["op"]]
    found = registry.find(op)
    assert found is not None, f"no rule for {op}"
    pairs: list[Any] = []
    for name, scale in zip(row["inputs"], row["scales"], strict=True):
        pairs.append(Pair(torch.tensor(GOLDEN["inputs"][name]), torch.tensor(scale) if as_tensors else scale))
    args, kwargs = more(row.get("params", {})), {}
    if row["op"] == "concatenate":
        pairs = [pairs]
    if row["op"] == "select_n":  # theirs takes the second case where the mask is true
        pairs = [torch.tensor(row["params"]["mask"]), pairs[1], pairs[0]]
    if row["op"] == "convert_element_type":
        kwargs = {"dtype": torch.float16}
    result = found.function(*pairs, *args, **kwargs)
    if row["op"] == "is_finite":  # aten has its negation among what reaches a rule
        return ~(result.data if isinstance(result, Pair) else result)
    return result[0] if isinstance(result, (tuple, list)) else result


def name_of(row: dict[str, Any]) -> str:
    more = f"({row['params']['y']})" if "y" in row.get("params", {}) else ""
    return f"{row['op']}{more}-" + "-".join(f"2^{int(math.log2(s))}" for s in row["scales"])


@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_value_and_scale_are_those_of_the_authors_package(row: dict[str, Any], as_tensors: bool) -> None:
    data, scale = theirs(row)
    found = ours(row, as_tensors)
    if scale is None or not isinstance(found, Pair):
        assert (scale is None) is not isinstance(found, Pair), "one is scaled, the other not"
        assert torch.equal(found.to(data.dtype), data)
        return
    want = data.double() * scale
    if row["op"] == "log_softmax":
        assert want.isnan().all(), "theirs works now: take the row out of DIFFERENT"
        inputs = torch.tensor(GOLDEN["inputs"]["a"], dtype=torch.float64) * row["scales"][0]
        want = torch.log_softmax(inputs, 1)
    wide = Pair(found.data.double(), found.scale)
    torch.testing.assert_close(value(wide), want, rtol=3e-6, atol=1e-6 * float(want.abs().max()))
    differs = DIFFERENT.get(row["op"], (lambda row: False, ""))
    assert (float(found.scale) != scale) is differs[0](row), f"scale {float(found.scale)}, theirs {scale}; {differs[1]}"


def test_every_row_is_compared_and_every_difference_is_met() -> None:
    names = {row["op"] for row in ROWS}
    assert names == set(OURS)
    for op, (where, _) in DIFFERENT.items():
        met = [where(row) for row in ROWS if row["op"] == op]
        assert any(met), f"{op}: named as different, but no row is"


def test_a_wrong_scale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a rule whose value is right and whose scale is not."""
    row = next(row for row in ROWS if row["op"] == "mul")
    table = dict(registry.TABLE)
    right = table[aten.mul.Tensor]

    def wrong(a: Pair, b: Pair) -> Pair:
        out = right.function(a, b)
        return Pair(out.data * 2, out.scale / 2)

    table[aten.mul.Tensor] = registry.Rule(right.op, wrong, right.kind, "")
    monkeypatch.setattr(registry, "_TABLE", table)
    with pytest.raises(AssertionError, match="theirs"):
        test_value_and_scale_are_those_of_the_authors_package(row, False)


def test_the_header_says_where_the_rows_come_from() -> None:
    assert {"jax-scalify", "jax", "python", "command"} <= set(GOLDEN["header"])
    assert isoscale.scalify.rules.__all__
