"""Powers of two around a float32 matrix product become its `alpha`.

A parameter under a scale would be multiplied before each product, and its gradient after it: passes over the largest
tensors of a model that buy nothing where the data are float32. Moved into the product they are free. Factors that a
pointwise kernel takes along anyway (on activations, casts to half) are left alone.
"""

from __future__ import annotations

import torch
from torch import fx

from isoscale.scalify.scales import is_power_of_two

aten = torch.ops.aten
_LAYOUT = {
    aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default, aten.reshape.default,
    aten._unsafe_view.default, aten.detach.default, aten.alias.default,
}  # fmt: skip
_WIDE = (torch.float32, torch.float64)


def fold(module: fx.GraphModule) -> int:
    """Rewrite products in place, drop factors of 1; returns how many factors went."""
    count = 0
    for node in list(module.graph.nodes):
        if _factor(node) == 1.0:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            count += 1
            continue
        zero_beta = node.target is aten.addmm.default and node.kwargs.get("beta") == 0
        if (node.target is aten.mm.default or zero_beta) and node.meta["val"].dtype in _WIDE:
            count += _fold_one(module.graph, node)
    if count:
        module.graph.eliminate_dead_code()
        module.recompile()
    return count


def _fold_one(graph: fx.Graph, node: fx.Node) -> int:
    left, right = node.args[-2:]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    alpha: float = node.kwargs.get("alpha", 1.0)  # type: ignore[assignment]
    count = 0
    operands = []
    for operand in (left, right):
        bare, factor = _bare(graph, node, operand)
        operands.append(bare)
        alpha, count = alpha * factor, count + (factor != 1)
    end = node
    while len(end.users) == 1:
        (user,) = end.users
        more = _factor(user)
        if more is not None:
            alpha, count = alpha * more, count + 1
            user.replace_all_uses_with(end)
            graph.erase_node(user)
        elif user.target in _LAYOUT:
            end = user
        else:
            break
    if count:
        _multiply(graph, node, operands, alpha)
    return count


def _factor(node: fx.Node) -> float | None:
    """The power of two that a node multiplies its first operand by, if that is all it does."""
    if node.target is not aten.mul.Tensor or not isinstance(node.args[1], (int, float)):
        return None
    source, factor = node.args[0], float(node.args[1])
    if not isinstance(source, fx.Node):
        return None
    same = node.meta["val"].dtype == source.meta["val"].dtype in _WIDE
    return factor if same and is_power_of_two(factor) else None


def _bare(graph: fx.Graph, before: fx.Node, operand: fx.Node) -> tuple[fx.Node, float]:
    """An operand without the factor on the graph's input behind it, and that factor."""
    views, x = [], operand
    while x.target in _LAYOUT and isinstance(x.args[0], fx.Node):
        views.append(x)
        x = x.args[0]
    factor = _factor(x)
    if factor is None or not isinstance(x.args[0], fx.Node) or x.args[0].op != "placeholder":
        return operand, 1.0
    base = x.args[0]
    with graph.inserting_before(before):
        for view in reversed(views):
            source, under = view.args[0], base
            base = graph.node_copy(view, lambda n, source=source, under=under: under if n is source else n)  # type: ignore[misc]
    return base, factor


def _multiply(graph: fx.Graph, node: fx.Node, operands: list[fx.Node], alpha: float) -> None:
    left, right = operands
    with graph.inserting_before(node):
        if alpha == 1:
            new = graph.call_function(aten.mm.default, (left, right))
        else:  # with beta = 0 the addend is not read; it needs a shape only
            like = graph.call_function(aten.select.int, (right, 0, 0))
            like.meta["val"] = aten.select.int(right.meta["val"], 0, 0)
            new = graph.call_function(aten.addmm.default, (like, left, right), {"beta": 0, "alpha": alpha})
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
