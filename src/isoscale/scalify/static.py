"""`static_backend`: scaled arithmetic for a plain float32 model, under scales fixed at compile time.

    model = torch.compile(model, backend=iso.scalify.static_backend(dtype=torch.float16, fp8=True))

Parameters, gradients and the optimiser stay as they are. Between them, forward and backward run on data near unit RMS
in the dtype asked for; each scale is a power of two that the rules gave when the graph was compiled, so no arithmetic
on scales is left to run and there is no loss scale. Use `ScaledTensor` where scales should follow training, or where
optimiser state should be in fp16.

It hooks into AOTAutograd's joint graph, before it is split into forward and backward, so what is saved between the two
is data. Inductor gets there through its pass ahead of all its own, which keeps everything else of it in place.
"""

from __future__ import annotations

import functools
import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch._C import DispatchKey
from torch._ops import OpOverload

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.planning.names import normalise
from isoscale.scalify import registry
from isoscale.scalify.errors import wrong_scale
from isoscale.scalify.scales import is_power_of_two, nearest2
from isoscale.scalify.static_fold import fold
from isoscale.scalify.static_graph import Settings, replace, rewrite

Compiled: TypeAlias = Callable[..., Any]
NAME = "isoscale_scalify"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ZEROS = 2.0**-6
"""The scale of a parameter that is all zeros: it will not stay so, and sums should take their scale from elsewhere."""


class StaticBackend:
    """A backend for torch.compile; made by `static_backend`.

    Attributes:
        graphs: the rewritten graphs, joint or forward only, in the order in which they were compiled.
        scales: name -> scale of each float input of the last graph.
        fallbacks: how often an operator without a rule was let through, by name.
    """

    def __init__(
        self, settings: Settings, given: Mapping[str, float], compiler: Literal["inductor", "eager"]
    ) -> None:
        self.__name__ = NAME
        self.settings, self.given, self.compiler = settings, dict(given), compiler
        self.graphs: list[fx.GraphModule] = []
        self.scales: dict[str, float] = {}
        self.fallbacks: Counter[str] = Counter()
        settings.on_fallback = self._count

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        by_index, self.scales = [], {}
        for node, x in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
            by_index.append(1.0)
            if isinstance(x, Tensor) and x.is_floating_point():
                name, kind = _source(node, x)
                by_index[-1] = self.scales[name] = self.given.get(name) or _scale(x, kind)
        for name in set(self.given) - set(self.scales):
            near = did_you_mean(name, list(self.scales))
            warnings.warn(f"scales: no float input {name!r} in this graph; {near}", UserWarning, stacklevel=2)
        compiler = _inductor if self.compiler == "inductor" else _eager
        return compiler(self, by_index, module, inputs)

    def rewrite(self, module: fx.GraphModule, by_index: Sequence[float], decompositions: Mapping[Any, Any]) -> None:
        """Rewrite an aten graph in place."""
        scale_of = {}
        for node in module.graph.find_nodes(op="placeholder"):
            index = getattr(node.meta.get("desc"), "idx", None)  # autograd drops duplicates and adds tangents
            if index is not None:
                scale_of[node.name] = by_index[index]
        made = rewrite(module, scale_of, self.settings, decompositions)
        fold(made)
        self.graphs.append(made)
        replace(module, made)

    def key(self, by_index: Sequence[float]) -> str | None:
        """What a cached graph is kept under; None if it must not be, since a fallback is to be counted."""
        if self.settings.fallback:
            return None
        code = [path.read_text() for path in sorted(Path(__file__).parent.rglob("*.py"))]
        state = (self.settings.dtype, self.settings.fp8, by_index, registry.version(), code)
        return hashlib.sha256(repr(state).encode()).hexdigest()

    def _count(self, op: str, line: str) -> None:
        self.fallbacks[op] += 1
        warnings.warn(f"{op} has no scale rule and runs on plain values, as allowed. {line}", UserWarning, stacklevel=2)


def static_backend(
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    scales: Mapping[str, float] | None = None,
    fallback: Iterable[str] = (),
    compiler: Literal["inductor", "eager"] = "inductor",
) -> StaticBackend:
    """A backend for torch.compile that computes on scaled data under static scales.

    Args:
        dtype: of the data that stand for float32 tensors: float32, float16 or bfloat16. Inductor rounds what is stored,
            and may leave out roundings inside a kernel.
        fp8: round the operands of linear layers (2-d products) to E4M3 and their cotangents to E5M2.
        scales: parameter, buffer or input name -> its scale, a power of two. By default a parameter's is the one
            nearest to its RMS at compile time and that of an input is 1.
        fallback: names of operators without a rule that may run on plain float32 values (`aten.foo.default`); each one
            that does is counted and warned of.
        compiler: what runs the rewritten graph; `eager` runs it as it is, for looking into.

    Raises:
        ConfigError: a setting that is none of these.
    """
    if dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ConfigError("data in this dtype are not supported", key="dtype", value=dtype, hint=f"one of {names}")
    if compiler not in ("inductor", "eager"):
        raise ConfigError("no such compiler", key="compiler", value=compiler, hint="inductor or eager")
    for scale in (scales or {}).values():
        if not is_power_of_two(scale):
            raise wrong_scale(scale)
    given = {normalise(name): float(scale) for name, scale in (scales or {}).items()}
    return StaticBackend(Settings(dtype, fp8, frozenset(fallback)), given, compiler)


def isoscale_scalify(
    module: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Compiled:
    """`torch.compile(model, backend="isoscale_scalify", options={...})`: `static_backend(**options)` by name."""
    return static_backend(**(options or {}))(module, inputs)


@functools.cache
def register() -> None:
    """Make the name known to torch.compile, unless the installed package's entry point does."""
    if not entry_points(group="torch_dynamo_backends", name=NAME):
        from torch._dynamo.backends.registry import register_backend

        register_backend(isoscale_scalify, name=NAME)


def _source(node: fx.Node, x: Tensor) -> tuple[str, str]:
    """(name, kind) of a graph input, from where Dynamo found it: L['self']._modules['0']._parameters['weight']."""
    found: Any = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", node.name)
    text: str = found if isinstance(found, str) else found()  # a method in older torch
    path = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text)
    if path:
        return normalise(".".join(path)), "buffer" if "_buffers[" in text else "parameter"
    keys = [a or b for a, b in re.findall(r"\['?([^]']+)'?\]|\.(\w+)", text)]  # L['batch']['x'], L['args'][0]
    return ".".join(keys) or text, "parameter" if isinstance(x, nn.Parameter) else "input"


def _scale(x: Tensor, kind: str) -> float:
    """Nearest power of two to the RMS of what is finite in a parameter or buffer; 1 for an input."""
    if kind == "input" or x.numel() == 0:
        return 1.0
    with torch.no_grad():
        finite = torch.where(torch.isfinite(x), x, 0.0).float()
        rms = float(torch.linalg.vector_norm(finite)) / x.numel() ** 0.5
    return float(nearest2(rms)) or (ZEROS if kind == "parameter" else 1.0)


def _pieces(fallback: frozenset[str]) -> dict[Any, Any]:
    """Decompositions of operators without a rule: then those of their pieces hold. All others stay whole."""
    from torch._inductor.decomposition import select_decomp_table

    def wanted(op: Any) -> bool:
        if not isinstance(op, OpOverload) or op.namespace != "aten" or str(op) in fallback:
            return False
        if op in registry.TABLE and not registry.writes(op):  # the graph must write nothing but its inputs
            return False
        takes_tensor = any(str(argument.type).startswith("Tensor") for argument in op._schema.arguments)
        return takes_tensor and not op.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)

    return {op: function for op, function in select_decomp_table().items() if wanted(op)}


def _inductor(backend: StaticBackend, by_index: Sequence[float], module: fx.GraphModule, inputs: Any) -> Compiled:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.decomposition import select_decomp_table

    class Rewrite(CustomGraphPass):
        """The first of Inductor's passes on the joint graph (on the forward graph, without gradients)."""

        def __call__(self, graph: fx.Graph) -> None:
            assert graph.owning_module is not None
            backend.rewrite(graph.owning_module, by_index, select_decomp_table())

        def uuid(self) -> str | None:
            return backend.key(by_index)

    # Operators arrive as autograd recorded them; Inductor's decompositions are applied inside `rewrite`.
    pieces = _pieces(backend.settings.fallback)
    made: Any = compile_fx(module, inputs, config_patches={"joint_custom_pre_pass": Rewrite()}, decompositions=pieces)
    return made  # type: ignore[no-any-return]


def _eager(backend: StaticBackend, by_index: Sequence[float], module: fx.GraphModule, inputs: Any) -> Compiled:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: fx.GraphModule, joint_inputs: Any, **more: Any) -> Any:
        backend.rewrite(joint, by_index, {})
        return min_cut_rematerialization_partition(joint, joint_inputs, **more)

    def run(graph: fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    def forward_only(graph: fx.GraphModule, example: Any) -> Any:
        backend.rewrite(graph, by_index, {})
        return run(graph, example)

    made: Compiled = aot_autograd(
        fw_compiler=run, bw_compiler=run, inference_compiler=forward_only, partition_fn=partition,
        decompositions=_pieces(backend.settings.fallback), keep_inference_input_mutations=True,
    )(module, inputs)  # fmt: skip
    return made
