"""Attention and routers in the graph of a forward: two ways in which an activation decides where another one goes."""

from __future__ import annotations

from dataclasses import dataclass

from isoscale.planning.trace_flow import ends
from isoscale.planning.trace_graph import ACT, PARAM, Graph, Node
from isoscale.planning.trace_ops import LIGHT


@dataclass(frozen=True)
class Scores:
    """One product of queries and keys; see `trace.Attention`."""

    path: str
    head_size: int
    scale: float
    queries: frozenset[str]
    fused: bool


def _product(g: Graph, node: Node) -> tuple[Node, float] | None:
    """The product of two activations behind these scores, and the numbers on the way (masks and biases left out)."""
    factor = 1.0
    while node.op != "bilinear":
        if node.op == "scale":
            factor *= node.factor
        elif node.op not in LIGHT and node.op not in ("linear", "add", "mul") and node.name != "tanh":
            return None
        acts = g.acts(node)
        if node.op in ("add", "mul", "linear") and len(acts) > 1:  # a bias made from the data beside the scores
            ways = [(found, way) for way in acts if (found := _product(g, way)) is not None]
            if not ways:
                return None
            (product, more), _ = ways[0]
            return product, factor * more
        if not acts:
            return None
        node = acts[0]
    return node, factor


def attention(g: Graph) -> list[Scores]:
    """Every q.k in order, fused or spelt out."""
    out: dict[int, Scores] = {}
    for node in g.nodes:
        if node.level != ACT:
            continue
        if node.op == "sdpa":
            q, k, v = (g.nodes[i] for i in node.inputs[:3])
            out[node.id] = _scores(g, node, q, k, v, node.factor)
        elif node.op == "softmax" and (found := _product(g, g.nodes[node.inputs[0]])) is not None:
            product, factor = found
            q, k = (g.nodes[i] for i in product.inputs)
            out.setdefault(product.id, _scores(g, product, q, k, None, factor))
    return list(out.values())


def _scores(g: Graph, at: Node, q: Node, k: Node, v: Node | None, factor: float) -> Scores:
    query, key = ends(g, q), ends(g, k)
    others = key.params | (ends(g, v).params if v is not None else frozenset())
    scale = float(f"{factor * query.factor * key.factor:.9g}")
    return Scores(at.path, q.shape[-1], scale, query.params, bool(query.params & others))


def consumers(g: Graph) -> list[list[int]]:
    """For each node the ids of those made from it."""
    out: list[list[int]] = [[] for _ in g.nodes]
    for node in g.nodes:
        for i in node.inputs:
            out[i].append(node.id)
    return out


def routes(g: Graph, users: list[list[int]], matmul: Node) -> bool:
    """Whether this product decides which expert a token goes to.

    It does when it reaches a top-k through views, numbers, biases and softmax or sigmoid; when its softmax weighs
    something; or when its sigmoid is one number per token that weighs something. A sigmoid of full width is a gate.
    """
    stack: list[tuple[int, str]] = [(matmul.id, "")]
    seen: set[int] = set()
    while stack:
        here, squashed = stack.pop()
        for i in users[here]:
            node = g.nodes[i]
            if i in seen:
                continue
            seen.add(i)
            if node.op == "topk":
                return True
            acts = [x for x in node.inputs if g.nodes[x].level == ACT]
            if node.op in ("softmax", "sigmoid"):
                stack.append((i, node.op))
            elif node.op == "mul" and len(acts) == 2 and squashed:
                if squashed == "softmax" or matmul.shape[-1] == 1:
                    return True
            elif node.op in LIGHT or (
                node.op in ("add", "linear") and all(g.nodes[x].level != ACT for x in node.inputs if x != here)
            ):
                stack.append((i, squashed))
    return False


def normalised(g: Graph, node: Node) -> bool:
    """Whether this gain or shift is applied to something normalised."""
    while True:
        acts = g.acts(node)
        if len(acts) != 1:
            return False
        node = g.through(acts[0], LIGHT)
        if node.op == "norm":
            return True
        if node.op not in ("mul", "add") or not any(g.nodes[i].level == PARAM for i in node.inputs):
            return False
