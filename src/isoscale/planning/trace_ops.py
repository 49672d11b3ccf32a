"""ATen operators into the few words of `trace_graph.Node`.

Fused operators are taken apart (addmm is a matmul and an add, layer_norm a norm, a mul and an add), so that the
analysis afterwards needs one rule per word. An operator that is not listed is `fn`: any function of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from isoscale.planning.trace_graph import ACT, CONST, NONE, PARAM, Graph, Node, Source, aligned, curved, moved

Operand = Any  # a Node or a number
Shape = Sequence[int]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SAME = _words(
    "_to_copy clone contiguous detach alias lift lift_fresh native_dropout dropout copy positive conj _conj"
)
VIEW = _words(
    "view _unsafe_view reshape _reshape_alias t transpose permute unsqueeze squeeze expand select slice split "
    "split_with_sizes chunk unbind narrow flip roll movedim flatten unflatten diagonal as_strided unfold view_as_real "
    "view_as_complex _reshape_copy view_copy real imag"
)
LINEAR = _words(
    "cat stack sum mean index_add scatter scatter_add index_put _index_put_impl masked_fill where masked_select "
    "constant_pad_nd repeat repeat_interleave cumsum triu tril avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_avg_pool1d upsample_nearest1d upsample_nearest2d upsample_bilinear2d "
    "upsample_bicubic2d im2col col2im pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d "
    "replication_pad1d replication_pad2d slice_scatter select_scatter masked_scatter index_copy complex _fft_r2c "
    "_fft_c2r _fft_c2c fill scatter_reduce index_reduce diag_embed"
)
SOFTMAX = frozenset({"_softmax", "_safe_softmax", "softmax"})
PICKS = frozenset({"topk", "argmax", "max"})
REDUCES = _words("mean sum var var_mean norm linalg_vector_norm std amax std_mean")
LIGHT = frozenset({"same", "view", "scale"})
_CURVES: dict[str, Callable[[float], float]] = {
    "sqrt": math.sqrt, "rsqrt": lambda x: x**-0.5, "reciprocal": lambda x: 1 / x,
}


def number(x: Operand) -> float | None:
    """The value of a number or of a known 0-dim constant."""
    if isinstance(x, Node):
        return x.value if x.level == CONST else None
    return float(x) if isinstance(x, (int, float)) else None


def same(g: Graph, x: Node, shape: Shape, name: str = "same") -> Node:
    """A cast, copy or dropout of x."""
    return g.emit("same", [x], shape, name=name, sources=aligned(x, shape), value=x.value)


def scale(g: Graph, x: Node, factor: float, shape: Shape | None = None) -> Node:
    """x times a number."""
    shape = x.shape if shape is None else shape
    if factor == 1.0 and tuple(shape) == x.shape:
        return x
    value = None if x.value is None else x.value * factor
    sources = aligned(x, shape) if x.level == PARAM else ()
    return g.emit("scale", [x], shape, factor=factor, value=value, sources=sources)


def add(g: Graph, a: Operand, b: Operand, shape: Shape, alpha: float = 1.0) -> Node:
    """a + alpha b, where one of them may be a number."""
    if not isinstance(a, Node):
        a, b = (scale(g, b, alpha) if isinstance(b, Node) else b), a
        alpha = 1.0
    if not isinstance(b, Node):
        shift = float(b) * alpha if isinstance(b, (int, float)) else 1.0
        if shift == 0.0:
            return same(g, a, shape, "add")
        value = None if a.value is None else a.value + shift
        return g.emit("add", [a, g.emit("const", [], (), value=shift)], shape, value=value,
                      sources=aligned(a, shape, "affine") if a.level == PARAM else ())  # fmt: skip
    if alpha != 1.0:
        b = scale(g, b, alpha)
    node = g.emit("add", [a, b], shape)
    parameters = [x for x in (a, b) if x.level == PARAM]
    if node.level == ACT:
        for parameter in [*parameters, *(x for x in (a, b) if picked(g, x))]:
            g.consume(parameter, "shift", node)
    elif len(parameters) == 2:
        node.sources = aligned(a, shape) + aligned(b, shape)
    elif parameters:
        node.sources = aligned(parameters[0], shape, "affine")
    return node


def picked(g: Graph, x: Node) -> bool:
    """Whether x is rows that the data itself chose (each token's expert's bias), not rows looked up by the input."""
    if x.level != ACT or not x.sources:
        return False
    table = g.nodes[max(source.lookup for source in x.sources)]
    stack = [g.nodes[i] for i in table.inputs[1:]] if table.name != "embedding" else []
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if node.level == ACT:
            return True
        if node.id not in seen:
            seen.add(node.id)
            stack.extend(g.nodes[i] for i in node.inputs)
    return False


def _statistic(g: Graph, x: Node, of: Node) -> bool:
    """Whether `x` is a reduction of `of` (rsqrt of a mean of squares, a vector norm), found within a few steps."""
    start = g.through(of, LIGHT)
    targets = {start.id} | ({g.through(a, LIGHT).id for a in g.acts(start)} if start.op == "add" else set())
    reduced = False
    for _ in range(16):
        if x.id in targets:
            return reduced
        reduced = reduced or x.name in REDUCES
        ahead = g.acts(x)
        if not ahead or x.op in ("matmul", "conv", "bilinear", "lookup"):
            return False
        x = max(ahead, key=lambda node: node.id)
    return False


def mul(g: Graph, a: Operand, b: Operand, shape: Shape) -> Node:
    """a b elementwise, where one of them may be a number."""
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Node) and (value := number(y)) is not None:
            return scale(g, x, value, shape)
    if not (isinstance(a, Node) and isinstance(b, Node)):  # a complex number
        return g.emit("linear", [x for x in (a, b) if isinstance(x, Node)], shape, name="mul")
    if a.level == b.level == ACT and (_statistic(g, b, a) or _statistic(g, a, b)):
        return g.emit("norm", [a, b], shape)
    node = g.emit("mul", [a, b], shape)
    parameters = [x for x in (a, b) if x.level == PARAM]
    if node.level == ACT:
        for parameter in parameters:
            g.consume(parameter, "gain", node)
    elif len(parameters) == 2:
        node.sources = curved(parameters)
    elif parameters:
        node.sources = aligned(parameters[0], shape)
    return node


def div(g: Graph, a: Operand, b: Operand, shape: Shape) -> Node:
    """a / b elementwise."""
    value = number(b)
    if isinstance(a, Node) and value:
        return scale(g, a, 1 / value, shape)
    if not isinstance(b, Node) or not isinstance(a, Node):
        return other(g, "div", [x for x in (a, b) if isinstance(x, Node)], shape)
    if b.level == CONST:
        return mul(g, a, b, shape)
    if a.level == ACT and b.level == ACT and _statistic(g, b, a):
        return g.emit("norm", [a, b], shape)
    if a.level == ACT:
        node = g.emit("div", [a, b], shape)
        if b.level == PARAM:
            g.consume(replace(b, sources=curved([b])), "other", node)
        return node
    return other(g, "div", [a, b], shape)


def other(g: Graph, name: str, inputs: Sequence[Node], shape: Shape, op: str = "fn") -> Node:
    """Any function of the inputs."""
    node = g.emit(op, inputs, shape, name=name)
    parameters = [x for x in inputs if x.level == PARAM]
    if node.level == PARAM:
        node.sources = curved(parameters)
    elif node.level == ACT:
        for parameter in parameters:
            g.consume(replace(parameter, sources=curved([parameter])), "other", node)
    elif name in _CURVES and len(inputs) == 1 and (value := inputs[0].value) is not None and value > 0:
        node.value = _CURVES[name](value)
    return node


def linear(g: Graph, name: str, inputs: Sequence[Node], shape: Shape) -> Node:
    """Something linear in all inputs together; parameters among activations are shifts (a class token in a cat)."""
    node = g.emit("linear", inputs, shape, name=name)
    parameters = [x for x in inputs if x.level == PARAM]
    if node.level == ACT:
        for parameter in parameters:
            g.consume(parameter, "shift", node)
    elif node.level == PARAM:
        keep = name not in ("stack", "sum", "mean", "repeat")
        for parameter in parameters:
            alike = keep and len(parameter.shape) == len(shape)
            node.sources += tuple(
                Source(s.name, s.dims if alike else None, s.form, s.lookup) for s in parameter.sources
            )
    return node


def view(g: Graph, name: str, x: Node, shape: Shape, args: Sequence[object]) -> Node:
    """x seen with other extents."""
    sources = tuple(
        Source(s.name, None if s.dims is None else moved(name, s.dims, x.shape, shape, args), s.form, s.lookup)
        for s in x.sources
    )
    return g.emit("view", [x], shape, name=name, sources=sources, value=x.value)


def _matrices(x: Node) -> bool:
    """Whether x is picked matrices (the experts of each token), not picked rows of a table."""
    return x.level == ACT and any(
        s.dims is not None and len(frozenset().union(*s.dims)) > 1 for s in x.sources
    )


def matmul(g: Graph, a: Node, b: Node, a_dim: int, b_dim: int, shape: Shape) -> Node:
    """The product of a and b, summed over `a_dim` of a and `b_dim` of b."""
    dims = {id(a): a_dim, id(b): b_dim}
    weight = next((x for x in (b, a) if x.level == PARAM), None) or next((x for x in (b, a) if _matrices(x)), None)
    if weight is None:
        if a.level == b.level == ACT:
            return g.emit("bilinear", [a, b], shape)
        return g.emit("linear", [a, b], shape, name="mm")
    data = a if weight is b else b
    node = g.emit("matmul", [data, weight], shape, level=ACT)
    g.consume(weight, "matmul", node, [dims[id(weight)] % len(weight.shape)])
    if data.level == PARAM and (len(data.sources) == 1 or all(source.form != "curved" for source in data.sources)):
        g.data.update(source.name for source in data.sources)
    return node


def conv(g: Graph, x: Node, weight: Node, shape: Shape, strides: Shape, transposed: bool, groups: int) -> Node:
    """A convolution without its bias."""
    if weight.level != PARAM:
        return other(g, "conv", [x, weight], shape)
    node = g.emit("conv", [x, weight], shape, level=ACT)
    kernel = range(2, len(weight.shape))
    # A transposed kernel no larger than its stride never overlaps itself: each output sums over channels only.
    summed = [0, *(k for k in kernel if weight.shape[k] > strides[min(k - 2, len(strides) - 1)])]
    g.consume(weight, "conv", node, summed if transposed else [1, *kernel], groups)
    return node


def norm(g: Graph, x: Node, weight: Operand, bias: Operand, shape: Shape, *, batch: bool = False) -> Node:
    """A normalisation, over a batch or not, with optional gain and shift."""
    if x.level == PARAM and not batch and isinstance(weight, Node):
        g.data.update(source.name for source in x.sources)
    if x.level != ACT:  # a weight that is standardised
        return other(g, "norm", [n for n in (x, weight, bias) if isinstance(n, Node)], shape)
    node = g.emit("norm", [x], shape)
    if isinstance(weight, Node):
        node = mul(g, node, weight, shape)
    return add(g, node, bias, shape) if isinstance(bias, Node) else node


def lookup(g: Graph, name: str, table: Node, inputs: Sequence[Node], shape: Shape, rank: int | None) -> Node:
    """Entries of `table` picked by integers.

    Args:
        g: the graph.
        name: ATen's word.
        table: what is picked from.
        inputs: all inputs.
        shape: of the result.
        rank: how many leading dims the picking made of the table's first dim; None where dims are not kept.
    """
    if table.level != PARAM:
        return g.emit("linear", inputs, shape, name=name)
    node = g.emit("lookup", inputs, shape, name=name, level=ACT)
    g.consume(table, "lookup", node)
    node.sources = tuple(
        Source(s.name, None if s.dims is None or rank is None else (NONE,) * rank + s.dims[1:], s.form, node.id)
        for s in table.sources
    )
    return node
