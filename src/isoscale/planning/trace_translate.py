"""Which word each ATen operator is, by its name and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from isoscale.planning import trace_ops as ops
from isoscale.planning.trace_graph import ACT, PARAM, Graph, Node, curved

Args = Sequence[Any]
Handler = Callable[[Graph, Args, Mapping[str, Any], Sequence[int]], Node]


def _get(args: Args, kwargs: Mapping[str, Any], index: int, name: str, default: Any) -> Any:
    found = args[index] if len(args) > index else kwargs.get(name, default)
    return default if found is None else found


def flat(value: Any) -> list[Node]:
    """The nodes among (nested) arguments, in order."""
    if isinstance(value, Node):
        return [value]
    if isinstance(value, (list, tuple)):
        return [node for item in value for node in flat(item)]
    return []


def _add(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    return ops.add(g, a[0], a[1], shape, float(_get(a, k, 2, "alpha", 1.0)))


def _sub(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    return ops.add(g, a[0], a[1], shape, -float(_get(a, k, 2, "alpha", 1.0)))


def _rsub(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    return ops.add(g, a[1], a[0], shape, -float(_get(a, k, 2, "alpha", 1.0)))


def _addc(join: Callable[..., Node]) -> Handler:
    def handler(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
        return ops.add(g, a[0], join(g, a[1], a[2], shape), shape, float(_get(a, k, 3, "value", 1.0)))

    return handler


def _lerp(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    return ops.add(g, a[0], ops.mul(g, ops.add(g, a[1], a[0], shape, -1.0), a[2], shape), shape)


def _mm(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    return ops.matmul(g, a[0], a[1], -1, -1 if len(a[1].shape) == 1 else -2, shape)


def _addmm(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    product = ops.scale(g, _mm(g, a[1:], {}, shape), float(k.get("alpha", 1.0)))
    beta = float(k.get("beta", 1.0))
    return product if beta == 0.0 else ops.add(g, ops.scale(g, a[0], beta), product, shape)


def _gelu_addmm(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    return ops.other(g, "gelu", [_addmm(g, a, {}, shape)], shape)


def _linear(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    product = ops.matmul(g, a[0], a[1], -1, -1, shape)
    bias = _get(a, k, 2, "bias", None)
    return ops.add(g, product, bias, shape) if isinstance(bias, Node) else product


def _conv(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    node = ops.conv(g, a[0], a[1], shape, a[3], bool(a[6]), int(a[8]))
    return ops.add(g, node, a[2], shape) if isinstance(a[2], Node) else node


def _norm(weight: int, *, batch: bool = False) -> Handler:
    def handler(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
        gain, shift = _get(a, k, weight, "weight", None), _get(a, k, weight + 1, "bias", None)
        return ops.norm(g, a[0], gain, shift, shape, batch=batch)

    return handler


def _embedding(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    return ops.lookup(g, "embedding", a[0], [a[0], a[1]], shape, len(a[1].shape))


def _bag(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    return ops.lookup(g, "embedding", a[0], [a[0], a[1]], shape, None)


def _index(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    first = a[1][0] if a[1] else None
    alone = all(item is None for item in a[1][1:])
    rank = len(first.shape) if isinstance(first, Node) and alone else None
    return ops.lookup(g, "index", a[0], flat(a), shape, rank)


def _index_select(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    return ops.lookup(g, "index_select", a[0], flat(a), shape, 1 if a[1] == 0 else None)


def _gather(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    return ops.lookup(g, "gather", a[0], flat(a), shape, None)


def _copy(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    return ops.same(g, a[1], shape, "copy") if isinstance(a[1], Node) else g.emit("const", [], shape)


def _sdpa(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    mask = k.get("attn_mask", a[3] if len(a) > 3 else None)
    node = ops.other(g, "sdpa", [*a[:3], *flat(mask)], shape, "sdpa")
    given = k.get("scale")
    node.factor = float(given) if given is not None else a[0].shape[-1] ** -0.5
    return node


def _recurrent(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    """A fused recurrent layer or cell: matrices [gates, in] and biases among the arguments."""
    inputs = flat(list(a))
    node = g.emit("fn", inputs, shape, name="recurrent", level=ACT)
    for weight in inputs:
        if weight.level == PARAM:
            matrix = len(weight.shape) == 2
            g.consume(weight, "matmul" if matrix else "shift", node, [1] if matrix else [])
    return node


def _pow(g: Graph, a: Args, k: Mapping[str, Any], shape: Sequence[int]) -> Node:
    return ops.same(g, a[0], shape) if a[1] == 1 else ops.other(g, "pow", flat(a), shape)


_HANDLERS: dict[str, Handler] = {
    "add": _add, "sub": _sub, "rsub": _rsub, "lerp": _lerp, "addcmul": _addc(ops.mul), "addcdiv": _addc(ops.div),
    "mul": lambda g, a, k, s: ops.mul(g, a[0], a[1], s), "div": lambda g, a, k, s: ops.div(g, a[0], a[1], s),
    "true_divide": lambda g, a, k, s: ops.div(g, a[0], a[1], s), "neg": lambda g, a, k, s: ops.scale(g, a[0], -1.0),
    "mm": _mm, "bmm": _mm, "mv": _mm, "dot": _mm, "_grouped_mm": _mm, "addmm": _addmm, "baddbmm": _addmm,
    "addmv": _addmm, "_addmm_activation": _gelu_addmm, "linear": _linear, "convolution": _conv, "_convolution": _conv,
    "convolution_overrideable": _conv, "native_layer_norm": _norm(2), "_fused_rms_norm": _norm(2),
    "native_group_norm": _norm(1), "layer_norm": _norm(2), "rms_norm": _norm(2),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
                     "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_no_update", "batch_norm"),
                    _norm(1, batch=True)),
    "embedding": _embedding, "_embedding_bag": _bag,
    "index": _index, "index_select": _index_select, "gather": _gather, "take": _gather, "copy_": _copy,
    **dict.fromkeys(("mkldnn_rnn_layer", "lstm", "gru", "_cudnn_rnn", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell",
                     "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"), _recurrent),
    "sigmoid": lambda g, a, k, s: ops.other(g, "sigmoid", flat(a), s, "sigmoid"), "pow": _pow,
}  # fmt: skip


def translate(
    g: Graph, name: str, args: Args, kwargs: Mapping[str, Any], shapes: Sequence[Sequence[int]], real: Sequence[bool]
) -> list[Node]:
    """Nodes of the results of one ATen call.

    Args:
        g: where they go.
        name: the operator without namespace and overload, with the `_` of an in-place one.
        args: its arguments, with nodes in place of tensors.
        kwargs: its named arguments, likewise.
        shapes: extents of each result.
        real: whether each result is of floating point (others carry no activation on).
    """
    inputs = flat(list(args)) + flat(list(kwargs.values()))
    for node in inputs:
        g.touched.update(source.name for source in node.sources)
    bare = name if name == "copy_" else name.rstrip("_")
    out = [] if not (real and real[0]) else [_first(g, bare, args, kwargs, shapes[0], inputs)]
    for shape, floats in list(zip(shapes, real))[len(out) :]:
        if not floats:  # integers and truths: they steer, they carry nothing
            out.append(g.emit("topk" if bare in ops.PICKS else "fn", inputs, shape, name=bare, level=0))
        elif bare in ops.VIEW:
            out.append(ops.view(g, bare, args[0], shape, args[1:]))
        else:  # a by-product (mean and rstd of a norm): the first result has consumed the parameters
            extra = g.emit("fn", inputs, shape, name=bare)
            extra.sources = curved(inputs) if extra.level == PARAM else ()
            out.append(extra)
    return out


def _first(
    g: Graph, bare: str, args: Args, kwargs: Mapping[str, Any], shape: Sequence[int], inputs: list[Node]
) -> Node:
    if not inputs:
        fill = {"zeros": 0.0, "ones": 1.0, "full": args[1] if len(args) > 1 else None,
                "scalar_tensor": args[0] if args else None}.get(bare)  # fmt: skip
        value = float(fill) if isinstance(fill, (int, float)) and len(shape) == 0 else None
        return g.emit("const", [], shape, name=bare, value=value)
    if bare in _HANDLERS:
        return _HANDLERS[bare](g, args, kwargs, shape)
    if bare in ops.SAME:
        return ops.same(g, args[0], shape, bare)
    if bare in ops.VIEW:
        return ops.view(g, bare, args[0], shape, args[1:])
    if bare in ops.LINEAR:
        return ops.linear(g, bare, inputs, shape)
    if "scaled_dot_product" in bare or bare.endswith("_attention_forward"):
        return _sdpa(g, args, kwargs, shape)
    if bare.startswith(("zeros_like", "empty_like", "new_zeros", "new_empty", "ones_like", "full_like", "new_ones")):
        return g.emit("const", [], shape, name=bare)
    if bare in ops.SOFTMAX:
        return ops.other(g, bare, inputs, shape, "softmax")
    if bare == "topk" or (bare in ops.PICKS and len(shape) < len(inputs[0].shape)):  # not an elementwise max
        return ops.other(g, bare, inputs, shape, "topk")
    return ops.other(g, bare, inputs, shape)
