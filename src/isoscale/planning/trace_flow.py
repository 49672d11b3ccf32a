"""What the graph of a forward says: which parameters end in a value, and where the residual branches are."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from isoscale.planning.trace_graph import ACT, CONST, PARAM, Graph, Node
from isoscale.planning.trace_ops import LIGHT

_CHAIN = 16  # parallel branches of one block (attention beside MLP) that a skip may be looked up through
_WEIGHTED = frozenset({"matmul", "conv"})


@dataclass(frozen=True)
class Ends:
    """What a value is linear in.

    Args:
        params: scaling all of these by c scales the value by c; empty when nothing does that exactly.
        factor: product of the numbers on the way back to the first of them.
    """

    params: frozenset[str]
    factor: float


def ends(g: Graph, node: Node, stop: Container[int] = ()) -> Ends:
    """The parameters that `node` is linear in, nearest first on every way back.

    Args:
        g: the graph.
        node: the value.
        stop: ids of nodes (a residual stream) that nothing may scale.
    """
    names: set[str] = set()
    factor: float | None = None
    stack: list[tuple[Node, float]] = [(node, 1.0)]
    seen: set[int] = set()
    solved = True
    while stack and solved:
        here, so_far = stack.pop()
        if here.id in seen:
            continue
        seen.add(here.id)
        ahead: list[Node] | None
        if here.id in stop:
            ahead = None
        elif here.level == PARAM:
            ahead = [] if all(source.form == "linear" for source in here.sources) else None
            names.update(source.name for source in here.sources)
        elif here.op in ("matmul", "conv", "lookup"):
            weight = g.nodes[here.inputs[0 if here.op == "lookup" else 1]]
            ahead = [] if all(source.form == "linear" for source in weight.sources) else None
            names.update(source.name for source in weight.sources)
        else:
            ahead = _ahead(g, here, stop)
        if ahead is None:
            solved = False
        if not ahead:
            factor = so_far if factor is None else factor
        elif here.op == "scale":
            so_far *= here.factor
        stack += [(way, so_far) for way in ahead or ()]
    return Ends(frozenset(names) if solved else frozenset(), 1.0 if factor is None else factor)


def _ahead(g: Graph, node: Node, stop: Container[int]) -> list[Node] | None:
    """The inputs that must all be scaled to scale this activation; None when no choice does it."""
    inputs = [g.nodes[i] for i in node.inputs]
    acts = [x for x in inputs if x.level == ACT]
    if node.op in LIGHT:
        return inputs[:1]
    if node.op == "linear":
        return [x for x in inputs if x.level != CONST]
    if node.op == "add":
        return inputs if all(x.level != CONST for x in inputs) else None
    if node.op == "mul":
        parameters = [x for x in inputs if x.level == PARAM]
        if parameters and all(source.form == "linear" for source in parameters[0].sources):
            return parameters
        return acts if len(acts) == 1 else _side(g, acts, stop)
    if node.op == "bilinear":
        return _side(g, acts, stop)
    if node.op == "div":
        return inputs[:1]
    if node.op == "sdpa":
        return inputs[2:3]
    return None


def _side(g: Graph, acts: list[Node], stop: Container[int]) -> list[Node] | None:
    """Of two multiplied activations the one to scale: the one that is broadcast onto is the value, the other a gate."""
    a, b = acts
    sizes = [_size(x) for x in acts]
    if sizes[0] != sizes[1] and len(a.shape) == len(b.shape):
        return [a if sizes[0] > sizes[1] else b]
    able = [x for x in acts if ends(g, x, stop).params]
    return able if len(able) == 1 else None


def _size(node: Node) -> int:
    total = 1
    for extent in node.shape:
        total *= extent
    return total


@dataclass(frozen=True)
class Residual:
    """One add of a branch to its stream.

    Args:
        add: id of the add.
        stream: id of the value that skips the branch.
        branch: id of the branch's output.
        region: ids of what the branch computed.
    """

    add: int
    stream: int
    branch: int
    region: frozenset[int]


def _core(g: Graph, node: Node) -> Node:
    """The value behind views, casts and scalar multiples."""
    while True:
        node = g.through(node, LIGHT)
        if node.op != "mul":
            return node
        factors = [x for x in (g.nodes[i] for i in node.inputs) if x.level == PARAM and _size(x) == 1]
        acts = g.acts(node)
        if not factors or len(acts) != 1:
            return node
        node = acts[0]


def _region(g: Graph, stream: Node, branch: Node) -> tuple[set[int], set[int]] | None:
    """(all that fed `branch` since `stream`, those of it that descend from `stream`); None when it does not."""
    found: set[int] = set()
    stack = [branch.id]
    reached = False
    while stack:
        here = stack.pop()
        if here == stream.id:
            reached = True
        elif here > stream.id and here not in found and g.nodes[here].level == ACT:
            found.add(here)
            stack.extend(g.nodes[here].inputs)
    if not reached:
        return None
    below = {stream.id}
    for here in sorted(found):
        if any(i in below for i in g.nodes[here].inputs):
            below.add(here)
    return found, below - {stream.id}


def residuals(g: Graph) -> list[Residual]:
    """The residual adds in order, long skips over other residual adds left out."""
    found: dict[int, Residual] = {}

    def chain(node: Node) -> Iterator[Node]:
        for _ in range(_CHAIN):
            yield node
            if node.id not in found:
                return
            node = g.nodes[found[node.id].stream]

    for node in g.nodes:
        if node.op != "add" or len(acts := g.acts(node)) != 2:
            continue
        for skip, branch in (acts, acts[::-1]):
            region = None
            for stream in chain(_core(g, skip)):
                if stream.id < branch.id and (region := _region(g, stream, branch)) is not None:
                    break
            if region is None:
                continue
            inside, below = region
            if any(g.nodes[i].op in _WEIGHTED for i in below) and not any(i in found for i in below):
                found[node.id] = Residual(node.id, stream.id, branch.id, frozenset(inside))
            break
    return list(found.values())


def projected(g: Graph) -> list[int]:
    """Ids of adds of two convolved activations: residual adds whose skip is a projection, so no identity."""

    def convolved(node: Node) -> bool:
        while node.op != "conv":
            acts = g.acts(node)
            if node.op in ("matmul", "bilinear", "sdpa", "lookup") or len(acts) != 1:
                return False
            node = acts[0]
        return True

    adds = (node for node in g.nodes if node.op == "add")
    return [node.id for node in adds if len(acts := g.acts(node)) == 2 and all(map(convolved, acts))]
