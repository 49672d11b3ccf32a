"""The small graph that a traced forward leaves behind: nodes, where parameters went, and how dims moved.

A node is one value of the forward, written in a dozen words (`add`, `mul`, `matmul`, ...) instead of ATen's two
thousand; `trace_ops.py` does the translation. Ids grow in the order of execution, so every ancestor of a node has a
smaller id and searches stop early.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

CONST, PARAM, ACT = 0, 1, 2
"""What a value depends on: neither parameters nor data; parameters only; data (or a looked-up parameter)."""

Form = Literal["linear", "affine", "curved"]
Dims = tuple[frozenset[int], ...]
NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Source:
    """One parameter inside a value that is made of parameters only.

    Args:
        name: normalised name.
        dims: for each dim of the value the dims of the parameter it is made of; None when lost.
        form: how the value depends on the parameter: `w` and `2 w` are linear, `1 + w` affine, `exp(w)` curved.
        lookup: id of the lookup that picked it by integer index, -1 when it is whole.
    """

    name: str
    dims: Dims | None
    form: Form = "linear"
    lookup: int = -1


@dataclass(slots=True)
class Node:
    """One value.

    Args:
        id: its position in the graph.
        op: `param input const same view linear scale add mul div matmul bilinear conv sdpa softmax sigmoid topk norm
            lookup fn`; `linear` is linear in all its inputs together (sum, cat, gather, ...), `bilinear` a product of
            two activations, `fn` anything else.
        inputs: ids of what it is made from; a matmul has (data, weight).
        level: CONST, PARAM or ACT.
        shape: its extents.
        path: normalised path of the innermost module running.
        name: ATen's word for it.
        factor: number it multiplies its input with (op `scale`), or the softmax scale (op `sdpa`).
        value: the number itself, where a 0-dim constant is known.
        sources: parameters in it (PARAM level, lookups and views of lookups).
    """

    id: int
    op: str
    inputs: tuple[int, ...]
    level: int
    shape: tuple[int, ...]
    path: str
    name: str = ""
    factor: float = 1.0
    value: float | None = None
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Consumed:
    """A parameter meeting an activation in node `at`; see `trace.Use` for the kinds."""

    name: str
    kind: str
    at: int
    contracted: tuple[int, ...] | None = None
    groups: int = 1


class Graph:
    """Nodes in the order of execution, and the places where parameters were consumed."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.consumed: list[Consumed] = []
        self.touched: set[str] = set()
        self.data: set[str] = set()  # parameters that went where data goes (learned queries, latents)
        self.weights: set[int] = set()  # lookups that picked matrices (experts), not rows of a table
        self.path = ""

    def emit(
        self, op: str, inputs: Sequence[Node], shape: Sequence[int], *, name: str = "", level: int | None = None,
        factor: float = 1.0, value: float | None = None, sources: Iterable[Source] = (),
    ) -> Node:  # fmt: skip
        """A new node; its level is the highest of its inputs unless said."""
        node = Node(
            id=len(self.nodes), op=op, inputs=tuple(node.id for node in inputs),
            level=max((node.level for node in inputs), default=CONST) if level is None else level,
            shape=tuple(shape), path=self.path, name=name or op, factor=factor, value=value, sources=tuple(sources),
        )  # fmt: skip
        self.nodes.append(node)
        return node

    def consume(
        self, parameter: Node, kind: str, at: Node, contracted: Iterable[int] = (), groups: int = 1
    ) -> None:
        """Note that `parameter` (PARAM level, or a lookup of matrices) met an activation in `at`.

        Args:
            parameter: who.
            kind: how, see `trace.Kind`.
            at: where.
            groups: of a convolution.
            contracted: dims of the *value* that are summed over.
        """
        summed = tuple(contracted)
        for source in parameter.sources:
            if source.lookup >= 0:
                self.weights.add(source.lookup)
            if source.form == "curved":
                self.consumed.append(Consumed(source.name, "other", at.id))
                continue
            dims = None
            if summed and source.dims is not None:
                dims = tuple(sorted(frozenset().union(*(source.dims[dim] for dim in summed)))) or None
            self.consumed.append(Consumed(source.name, kind, at.id, dims, groups))

    def through(self, node: Node, ops: frozenset[str]) -> Node:
        """The first ancestor along first inputs whose op is not in `ops`."""
        while node.op in ops:
            node = self.nodes[node.inputs[0]]
        return node

    def acts(self, node: Node) -> list[Node]:
        """Its inputs that are activations."""
        return [self.nodes[i] for i in node.inputs if self.nodes[i].level == ACT]


def curved(nodes: Iterable[Node]) -> tuple[Source, ...]:
    """All sources of these nodes, as what a nonlinear function of them has."""
    found = {source.name: Source(source.name, None, "curved") for node in nodes for source in node.sources}
    return tuple(found.values())


def aligned(node: Node, shape: Sequence[int], form: Form | None = None) -> tuple[Source, ...]:
    """The node's sources after broadcasting to `shape`, optionally with a weaker form."""
    pad = len(shape) - len(node.shape)
    out = []
    for source in node.sources:
        dims = (NONE,) * pad + source.dims if source.dims is not None and pad >= 0 else None
        weaker = form if form is not None and source.form == "linear" else source.form
        out.append(replace(source, dims=dims, form=weaker))
    return tuple(out)


def regroup(dims: Dims, before: Sequence[int], after: Sequence[int]) -> Dims | None:
    """How dims move through a reshape: merged dims unite, parts of a split dim each keep it.

    Args:
        dims: dims of the parameter in each dim of the value before.
        before: its extents.
        after: its new extents.

    Returns:
        The dims after, or None when the extents do not factor.
    """
    if 0 in before or 0 in after:
        return None
    out: list[frozenset[int]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        first, have, want, start = i, before[i], after[j], j
        i, j = i + 1, j + 1
        while have != want:
            if have < want:
                if i == len(before):
                    return None
                have, i = have * before[i], i + 1
            else:
                if j == len(after):
                    return None
                want, j = want * after[j], j + 1
        real = [k for k in range(first, i) if before[k] > 1]
        united = frozenset().union(*(dims[k] for k in real or range(first, i)))
        out += [united if after[k] > 1 or j - start == 1 else NONE for k in range(start, j)]
    return (*out, *(NONE for _ in after[j:]))


def moved(name: str, dims: Dims, before: Sequence[int], after: Sequence[int], args: Sequence[object]) -> Dims | None:
    """How dims move through the view `name` with these ATen arguments (the tensor left out); None when unknown."""
    rank = len(before)
    numbers = [arg for arg in args if isinstance(arg, int) and not isinstance(arg, bool)]
    if name == "t":
        return dims[::-1]
    if name == "transpose":
        order = list(range(rank))
        a, b = numbers[0] % rank, numbers[1] % rank
        order[a], order[b] = order[b], order[a]
        return tuple(dims[i] for i in order)
    if name == "permute" and isinstance(args[0], (list, tuple)):
        return tuple(dims[int(i) % rank] for i in args[0])
    if name in ("select", "unbind"):
        drop = (numbers[0] if numbers else 0) % rank
        return dims[:drop] + dims[drop + 1 :]
    if name in ("slice", "split", "split_with_sizes", "narrow", "chunk"):
        return dims
    if name == "unsqueeze":
        at = numbers[0] % (rank + 1)
        return (*dims[:at], NONE, *dims[at:])
    if name == "expand":
        return (NONE,) * (len(after) - rank) + dims
    if name in ("view", "_unsafe_view", "reshape", "squeeze", "flatten", "unflatten"):
        return regroup(dims, before, after)
    return dims if tuple(before) == tuple(after) and name in ("flip", "roll", "triu", "tril") else None
