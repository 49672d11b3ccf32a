"""Rewrites one aten graph so that every tensor in it stands under a power of two known at compile time.

The graph is run once, operator by operator, on fake tensors: what a rule does to the data is recorded, what it does to
the scale is a product of Python numbers and leaves nothing in the graph. Rules are matched on the operators that
autograd recorded (layer norm, log-softmax); only what the rules do goes through a compiler's decompositions, since a
decomposed norm or loss has no rule of its own.

What is lost: scales are those of compile time. Data drift from unit RMS as parameters do.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_any, tree_leaves, tree_map

import isoscale
from isoscale.scalify import registry, scales
from isoscale.scalify.errors import RuleError
from isoscale.scalify.pair import Pair, times, value

aten = torch.ops.aten
_SIZES = {aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default}
# Operands of an nn.Linear: x and w in the forward, one of them and the cotangent in the backward.
_LINEAR = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}
_E4M3, _E5M2 = (torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)
_HALF_MAX = 65504.0
_NOT_THEIRS = tuple(str(Path(path).resolve().parent) for path in (torch.__file__, isoscale.__file__))


@dataclass
class Settings:
    """What a rewrite needs to know.

    Attributes:
        dtype: of the data that stand for float32 tensors.
        fp8: round the operands of linear layers to E4M3, cotangents to E5M2.
        fallback: operators without a rule that may run on plain values.
        on_fallback: called with the operator and the user's line each time one does.
    """

    dtype: torch.dtype = torch.float32
    fp8: bool = False
    fallback: frozenset[str] = frozenset()
    on_fallback: Callable[[str, str], None] = field(default=lambda op, line: None)


def rewrite(
    module: fx.GraphModule, scale_of: Mapping[str, float], settings: Settings, decompositions: Mapping[Any, Any]
) -> fx.GraphModule:
    """The same function of the same plain inputs, computed on data under static scales.

    Args:
        module: an aten graph, joint or forward only, with a fake tensor in each placeholder's `meta["val"]`.
        scale_of: placeholder name -> scale of a float input, a power of two; 1 for those not named.
        settings: see `Settings`.
        decompositions: what the compiler behind wants applied to the operators that the rules call.

    Raises:
        RuleError: an operator without a rule, or a rule whose scale depends on data.
    """
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    runner = _Runner(module, scale_of, settings)

    def flat(*args: Any) -> list[Any]:
        return tree_leaves(runner.run(*args, enable_io_processing=False))

    with fx.traceback.preserve_node_meta():
        made = make_fx(flat, dict(decompositions), _allow_non_fake_inputs=True)(*inputs)
    made.graph.eliminate_dead_code()
    news, olds = (graph.find_nodes(op="placeholder") for graph in (made.graph, module.graph))
    for new, old in zip(news, olds, strict=True):
        new.meta["desc"] = old.meta.get("desc")  # which input of the user's it is
    return made


class _Runner(fx.Interpreter):
    """Runs the graph with a `Pair` in place of every float tensor that has a scale."""

    def __init__(self, module: fx.GraphModule, scale_of: Mapping[str, float], settings: Settings) -> None:
        super().__init__(module)
        self.scale_of, self.settings = scale_of, settings
        self.raw: dict[fx.Node, Any] = {}
        self.node: fx.Node
        self.written = {node.args[0] for node in module.graph.nodes if node.target is aten.copy_.default}
        self.constants = {node.target: _constant(self.fetch_attr(node.target)) for node in module.graph.nodes
                          if node.op == "get_attr"}  # fmt: skip
        self.cotangents: set[fx.Node] = set()
        for node in module.graph.nodes:
            seed = node.op == "placeholder" and node.name.startswith("tangents")
            if seed or any(source in self.cotangents for source in node.all_input_nodes):
                self.cotangents.add(node)

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        x = self.raw[self.node] = super().placeholder(target, args, kwargs)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if self.node in self.written:  # running statistics: rounded to half, small changes would be lost
            return Pair(x, 1.0)
        scale = self.scale_of.get(self.node.name, 1.0)
        return Pair(self._low(times(x, 1.0 / scale)), scale)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.constants[target]

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        nodes, found = tree_leaves(self.node.args[0]), tree_leaves(args[0])
        return [self._plain(node, x) for node, x in zip(nodes, found, strict=True)]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, HigherOrderOperator):
            raise self._missing(str(target))
        if not isinstance(target, OpOverload):  # tuple access, arithmetic on sizes
            return target(*args, **kwargs)
        if target is aten.copy_.default and self.node.args[0] in self.raw:
            source = self.node.args[1]
            return target(self.raw[self.node.args[0]], self._plain(source, args[1]))  # type: ignore[index]
        if not tree_any(_is_pair, (args, kwargs)):
            return _split(target, args, kwargs)
        if target in _SIZES:
            return target(args[0].data, *args[1:])
        if target is aten._assert_tensor_metadata.default:
            return None
        row = registry.find(target)
        if row is None or registry.writes(target):
            return self._without_rule(target, args, kwargs)
        args, kwargs = self._operands(target, args), tree_map(self._operand, kwargs)
        out = row.function(*args, **kwargs)
        if any(isinstance(leaf.scale, Tensor) for leaf in tree_leaves(out) if isinstance(leaf, Pair)):
            raise RuleError(
                f"the rule of {target} takes its scale from data, which static scales cannot follow", key=str(target),
                place=self._line(), hint="write it with isoscale.scalify.scales on scales and shapes only",
            )  # fmt: skip
        return out

    def _operands(self, target: OpOverload, args: Sequence[Any]) -> list[Any]:
        out = [_number(x) if argument.type.kind() in ("TensorType", "NumberType") else x
               for x, argument in zip(args, target._schema.arguments)]  # fmt: skip
        out = [tree_map(self._operand, x) for x in out]
        for at in _LINEAR.get(target, ()) if self.settings.fp8 else ():
            dtype, top = _E5M2 if self.node.args[at] in self.cotangents else _E4M3
            data = out[at].data
            out[at] = Pair(data.clamp(-top, top).to(dtype).to(data.dtype), out[at].scale)
        return out

    def _operand(self, x: Any) -> Any:
        """What a rule gets: float tensors that no scaled one went into stand under 1; dtypes are those of the data."""
        if isinstance(x, torch.dtype):
            return self.settings.dtype if x == torch.float32 else x
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if self.settings.dtype == torch.float16 and x.dtype == torch.float32 and x.dim():
            x = x.clamp(-_HALF_MAX, _HALF_MAX)  # the largest negative float32 as a mask must not become -inf
        return Pair(self._low(x) if x.dim() else x, 1.0)

    def _low(self, x: Tensor) -> Tensor:
        return x.to(self.settings.dtype) if x.dtype == torch.float32 else x

    def _plain(self, node: Any, x: Any) -> Any:
        """The value of a node, in the dtype that it had."""
        if node in self.raw:
            return self.raw[node]
        return value(x, node.meta["val"].dtype) if isinstance(x, Pair) else x

    def _without_rule(self, target: OpOverload, args: Any, kwargs: Any) -> Any:
        if str(target) not in self.settings.fallback or registry.writes(target):
            raise self._missing(str(target), registry.suggestion(target))
        self.settings.on_fallback(str(target), self._line())

        def wide(x: Any) -> Any:
            return value(x, torch.float64 if x.data.dtype == torch.float64 else torch.float32) if _is_pair(x) else x

        out = target(*tree_map(wide, args), **tree_map(wide, kwargs))
        return tree_map(lambda x: Pair(self._low(x), 1.0) if _is_float(x) else x, out)

    def _missing(self, op: str, similar: str = "") -> RuleError:
        return RuleError(
            f"{op} has no scale rule", key=op, place=self._line(),
            hint=f'register one with @iso.scalify.rule(torch.ops.{op}) or allow it on plain values with '
            f'fallback=("{op}",); {similar}',
        )  # fmt: skip

    def _line(self) -> str:
        """Where the user wrote it: the innermost frame of the node's stack trace outside torch and isoscale."""
        frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', self.node.meta.get("stack_trace") or "")
        theirs = [frame for frame in frames if not frame[0].startswith(_NOT_THEIRS)] or frames
        return "" if not theirs else "{}:{} in {}: {}".format(*theirs[-1])


def _split(target: OpOverload, args: Any, kwargs: Any) -> Any:
    """An operator on plain operands; a 0-d constant made there is split like a number."""
    number = {aten.full.default: 1, aten.scalar_tensor.default: 0}.get(target)
    if number is None or not isinstance(args[number], float) or (number == 1 and len(args[0])):
        return target(*args, **kwargs)
    mantissa, scale = scales.split(args[number])
    out = target(*args[:number], mantissa, *args[number + 1 :], **kwargs)
    return Pair(out, scale) if out.is_floating_point() else target(*args, **kwargs)


def _constant(x: Any) -> Any:
    """A tensor of the user's code (`torch.tensor(0.5)`): its number is known, so its scale is."""
    if isinstance(x, Tensor) and x.dim() == 0 and x.is_floating_point():
        mantissa, scale = scales.split(float(x))
        return Pair(torch.tensor(mantissa, dtype=x.dtype, device=x.device), scale)
    return x


def _number(x: Any) -> Any:
    """A size used as a number (the N of a mean) as a pair: by comparisons, which bound a size and do not pin it."""
    if not isinstance(x, torch.SymInt):
        return x
    power = 1
    while 7 * power < 5 * x:  # until power >= x / sqrt(2), about
        power *= 2
    return Pair(x / power, float(power))


def _is_pair(x: Any) -> bool:
    return isinstance(x, Pair)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def replace(module: fx.GraphModule, made: fx.GraphModule) -> None:
    """Put the nodes of `made` in the place of those of `module`, whose placeholders and output keep their meta.

    In place, because partitioners and compilers hold on to the module and read what autograd wrote on its ends.
    """
    graph = module.graph
    end = graph.output_node()
    meta, kind = end.meta, tuple if isinstance(end.args[0], tuple) else list
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder":
            graph.erase_node(node)
    olds, news = graph.find_nodes(op="placeholder"), made.graph.find_nodes(op="placeholder")
    place: dict[fx.Node, fx.Node] = dict(zip(news, olds, strict=True))
    for node in made.graph.nodes:
        if node.op == "get_attr":
            name = f"_scaled_{node.target}"
            setattr(module, name, operator.attrgetter(node.target)(made))
            place[node] = graph.get_attr(name)
            place[node].meta = dict(node.meta)
        elif node.op == "output":
            graph.output(fx.map_arg(kind(tree_leaves(node.args[0])), place.__getitem__))
        elif node.op != "placeholder":
            place[node] = graph.node_copy(node, place.__getitem__)
    graph.output_node().meta = meta
    module.recompile()
