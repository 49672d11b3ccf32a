"""One forward, recorded: every ATen call becomes nodes of a graph, and the model is left as it was found.

On the meta device nothing has a value. Operators whose *shape* or *truth* depends on values are answered with made-up
ones: `nonzero` finds everything (so that every expert gets a token), `bool(all(x))` is true, a number is 0. A branch
that such an answer does not take is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from isoscale.planning.names import normalise
from isoscale.planning.trace_graph import ACT, PARAM, Graph, Node, Source
from isoscale.planning.trace_meta import answer, on_one_device
from isoscale.planning.trace_translate import translate


def _storage(tensor: torch.Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a wrapper subclass without storage
        return None


def _carries(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what runs under it.

    Args:
        parameters: by the name that `named_parameters` gives.
        buffers: what else must be left as it was.
        example: the inputs; their floating point tensors are data.
        data: names of parameters that are data too (learned queries).
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], buffers: Iterable[torch.Tensor], example: object,
        data: Container[str] = (),
    ) -> None:  # fmt: skip
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.nodes: Any = WeakTensorKeyDictionary()
        self.storages: dict[int, Node] = {}
        self.kept = {storage: buffer for buffer in (*buffers, *parameters.values())
                     if (storage := _storage(buffer)) is not None}  # fmt: skip
        self.aliases: dict[int, dict[int, Callable[[], torch.Tensor | None]]] = {}
        self.saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        for raw, parameter in parameters.items():
            shape = tuple(parameter.shape)
            whole = Source(normalise(raw), tuple(frozenset({dim}) for dim in range(len(shape))))
            node = self.graph.emit("param", [], shape, level=PARAM, sources=[whole])
            if whole.name in data:
                node, parent = self.graph.emit("fn", [node], shape, name="data", level=ACT), node
                self.graph.consume(parent, "shift", node)
                self.graph.touched.add(whole.name)
            self.nodes[parameter] = node
            if (storage := _storage(parameter)) is not None:
                self.storages[storage] = node
        for tensor in _tensors(example):
            self.nodes[tensor] = self.graph.emit("input", [], tensor.shape, level=ACT if _carries(tensor) else 0)

    def node(self, tensor: torch.Tensor) -> Node:
        """The node of a tensor; one never seen is a constant, or a parameter under another handle (`.data`)."""
        found: Node | None = self.nodes.get(tensor)
        if found is None:
            owner = self.storages.get(_storage(tensor) or -1)
            if owner is not None:
                sources = owner.sources if owner.shape == tuple(tensor.shape) else [
                    Source(source.name, None) for source in owner.sources
                ]  # fmt: skip
                found = self.graph.emit("view", [owner], tensor.shape, name="data", sources=sources)
            else:
                known = tensor.dim() == 0 and not tensor.is_meta and not tensor.is_complex()
                found = self.graph.emit("const", [], tensor.shape, value=float(tensor) if known else None)
            self.nodes[tensor] = found
        return found

    def _noded(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.node(value)
        if isinstance(value, (list, tuple)):
            return [self._noded(item) for item in value]
        return value

    def _protect(self, tensor: torch.Tensor) -> None:
        owner = self.kept.get(_storage(tensor) or -1)
        if owner is not None and not owner.is_meta and all(owner is not done for done, _ in self.saved):
            self.saved.append((owner, owner.detach().clone()))

    def restore(self) -> None:
        """Undo what the forward wrote into buffers and parameters."""
        for tensor, before in self.saved:
            tensor.detach().copy_(before)

    def _rebind(self, tensor: torch.Tensor, node: Node) -> None:
        """After a write into `tensor`: it is `node` now, and whatever shares its memory is patched with it."""
        storage = _storage(tensor)
        for reference in self.aliases.get(storage or -1, {}).values():
            alias = reference()
            if alias is None or alias is tensor or _storage(alias) != storage:
                continue
            whole = alias.numel() == tensor.numel()
            self.nodes[alias] = self.graph.emit(
                "same" if whole else "linear", [node] if whole else [self.node(alias), node], alias.shape, name="patch"
            )
        self.nodes[tensor] = node

    def _share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Remember that these tensors look at one memory."""
        for tensor in tensors:
            if (storage := _storage(tensor)) is not None:
                self.aliases.setdefault(storage, {})[id(tensor)] = TensorWeakRef(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call, then note it."""
        kwargs = kwargs or {}
        args, kwargs = on_one_device(args, kwargs, self._same_node)
        name = func.overloadpacket.__name__ if isinstance(func, torch._ops.OpOverload) else str(func)
        inputs, named = self._noded(args), {key: self._noded(value) for key, value in kwargs.items()}
        mutable = isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable
        if mutable:
            for tensor in _tensors((args, kwargs)):
                self._protect(tensor)
        hit, out = answer(name, args, kwargs, lambda tensor: self.node(tensor).name)
        if not hit:
            out = func(*args, **kwargs)
        results = list(_tensors(out))
        nodes = translate(self.graph, name, inputs, named, [r.shape for r in results], [_carries(r) for r in results])
        if getattr(func, "is_view", False):
            self._share((args[0], *results))
        given = {id(tensor) for tensor in _tensors((args, kwargs))} if mutable else set()
        for tensor, node in zip(results, nodes):
            if id(tensor) in given:
                self._rebind(tensor, node)
            else:
                self.nodes[tensor] = node
        return out

    def _same_node(self, old: torch.Tensor, new: torch.Tensor) -> None:
        self.nodes[new] = self.node(old)


@contextmanager
def _paths(model: nn.Module, graph: Graph) -> Iterator[None]:
    """Keep `graph.path` at the innermost running module of the model."""
    stack: list[str] = [""]

    def enter(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            stack.append(path)
            graph.path = path

        return hook

    def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
        stack.pop()
        graph.path = stack[-1]

    with ExitStack() as undo:
        for path, module in model.named_modules():
            undo.callback(module.register_forward_pre_hook(enter(normalise(path)), prepend=True).remove)
            undo.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Eval mode, no fused fast paths, random state and buffer tables as they were, afterwards."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in modules:
            module.training = False
        with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode, table in zip(modules, training, buffers):
            module.training = mode
            module._buffers.update(table)


def record(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, on_meta: bool = False,
    data: Container[str] = (),
) -> Graph:  # fmt: skip
    """The graph of one forward.

    Args:
        model: in any mode and on any device; left as it was.
        args: positional arguments of the forward.
        kwargs: named arguments of the forward.
        on_meta: run with stand-ins for all parameters, buffers and inputs on the meta device.
        data: names of parameters to treat as data, found by a run without.
    """
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    call: Callable[..., object] = model
    if on_meta:
        parameters = {name: tensor.detach().to("meta") for name, tensor in parameters.items()}
        state = {**parameters, **{name: tensor.to("meta") for name, tensor in model.named_buffers()}}
        args, kwargs = _to_meta(args), _to_meta(kwargs)

        def call(*args: Any, **kwargs: Any) -> object:
            return functional_call(model, state, args, kwargs)

    recorder = Recorder(parameters, model.buffers(), (args, kwargs), data)
    with _still(model), _paths(model, recorder.graph):
        try:
            with recorder:
                call(*args, **kwargs)
        finally:
            recorder.restore()
    found = recorder.graph.data
    if found and not data:
        return record(model, args, kwargs, on_meta=on_meta, data=frozenset(found))
    return recorder.graph


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, Mapping):
        return {key: _to_meta(item) for key, item in value.items()}
    return type(value)(_to_meta(item) for item in value) if type(value) in (list, tuple) else value
