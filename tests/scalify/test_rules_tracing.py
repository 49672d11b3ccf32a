"""Rules can be traced: nothing depends on data; number scales leave no arithmetic on scales behind."""

from __future__ import annotations

from typing import Any

import pytest
import rule_cases_basic  # noqa: F401
import rule_cases_nn  # noqa: F401
import torch
from rule_cases import CASES, Caller, Case, Inputs, op_named
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from isoscale.scalify import registry
from isoscale.scalify.pair import Pair

# Sizes or results that depend on data, in torch itself.
BY_DATA = ("nonzero", "is_nonzero", "_local_scalar_dense", "masked_select", "equal", "allclose")
TRACED = [c for c in CASES.values() if c.name.partition(":")[0] not in BY_DATA]


class Replay(Inputs):
    """Inputs that come from a list of data and scales."""

    def __init__(self, given: list[tuple[Tensor, Any]], span: int) -> None:
        super().__init__(span=span, pairs=True, tensors=True)
        self.given = list(given)

    def pack(self, data: Tensor) -> Any:
        return Pair(*self.given.pop(0))


def recorded(case: Case, tensors: bool) -> list[tuple[Tensor, Any]]:
    seen: list[tuple[Tensor, Any]] = []
    g = Inputs(span=case.span, pairs=True, tensors=tensors)
    pack = g.pack

    def record(data: Tensor) -> Any:
        pair = pack(data)
        seen.append((pair.data.clone(), pair.scale))
        return pair

    g.pack = record  # type: ignore[method-assign]
    case.run(Caller(True, []), g)
    return seen


def traced(case: Case, mode: str) -> GraphModule:
    given = recorded(case, True)

    def step(data: list[Tensor], scales: list[Tensor]) -> Any:
        out = case.run(Caller(True, []), Replay(list(zip(data, scales)), case.span))
        out = out if isinstance(out, (tuple, list)) else [out]
        return [(x.data, x.scale) if isinstance(x, Pair) else x for x in out if x is not None]

    return make_fx(step, tracing_mode=mode)([d for d, _ in given], [s for _, s in given])


@pytest.mark.parametrize("case", TRACED, ids=lambda case: case.name)
def test_no_rule_looks_at_data(case: Case) -> None:
    """Fake tensors have none: a rule that branched on data or called item would fail."""
    graph = traced(case, "fake").graph
    assert len(list(graph.nodes)) > 1
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert "aten._local_scalar_dense.default" not in names


def test_control_item_is_seen() -> None:
    with pytest.raises(Exception, match=r"item|data-dependent|DataDependent|symbol"):
        make_fx(lambda x: x * float(x.sum().item()), tracing_mode="fake")(torch.ones(3))


@pytest.mark.parametrize("name", [
    "mm", "addmm", "sum.dim_IntList", "mean", "_softmax", "_log_softmax", "native_layer_norm:affine", "native_layer_norm_backward:affine",
    "nll_loss_backward:1-plain", "convolution:2d", "linalg_vector_norm:2", "cumsum", "embedding_dense_backward", "avg_pool2d", "prod.dim_int",
])  # fmt: skip
def test_sizes_may_be_symbolic(name: str) -> None:
    graph = traced(CASES[name], "symbolic").graph
    assert any("sym_size" in str(node.target) for node in graph.nodes) or any(
        "s" in str(node.meta["val"].shape) for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)
    )


ONE = {
    "mm": (2, (), 4), "add.Tensor": (2, (), 1), "mul.Tensor": (2, (), 1), "gelu": (1, (), 1), "_log_softmax": (1, (1, False), 1),
    "_softmax": (1, (1, False), 2), "relu": (1, (), 1), "exp": (1, (), 1), "sum": (1, (), 2), "tanh": (1, (), 1), "threshold_backward": (2, (0.0,), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_number_scales_leave_the_operator_and_its_factor(name: str) -> None:
    """Under scale 1 a rule is the operator, at most with its shape's factor; no node is a scale's."""
    count, more, most = ONE[name]
    xs = [torch.randn(4, 4) for _ in range(count)]
    row = registry.TABLE[op_named(name)]
    graph = make_fx(lambda *data: row.function(*(Pair(d, 1.0) for d in data), *more).data)(*xs).graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    assert len(nodes) <= most, [str(node.target) for node in nodes]
    assert all(node.meta["val"].dim() > 0 or name == "sum" for node in nodes if "val" in node.meta and node.target not in (torch.ops.aten.new_empty.default,))


def test_fma_of_compiled_optimisers() -> None:
    """prims.fma exists once Inductor is imported; its rule is there by name."""
    import torch._inductor.inductor_prims

    row = registry.find(torch.ops.prims.fma.default)
    assert row is not None
    a, b, c = (torch.randn(5, dtype=torch.float64) for _ in range(3))
    out = row.function(Pair(a, torch.tensor(2.0**-9)), Pair(b, torch.tensor(4.0)), Pair(c, torch.tensor(2.0**-12)))
    torch.testing.assert_close(out.data * out.scale, a * b * 2.0**-7 + c * 2.0**-12)
    assert float(out.scale) == 2.0**-7
