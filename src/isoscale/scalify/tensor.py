"""`ScaledTensor`: a tensor that carries its scale through forward, backward and optimiser.

What it does. value = data * scale. Every aten operator, those of autograd's backward formulas included, arrives in
`__torch_dispatch__` and runs its rule on (data, scale); autograd itself never sees scales. Data stay near unit RMS, so
they can be fp16 or fp8 where the values could not.

Why a wrapper subclass: autograd, modules, hooks, `torch.compile` (it takes the two inner tensors into the graph) and
`torch.save` know the kind.

Writes. A view shares data *and* scale tensor with what it views. An in-place operator gives a whole tensor its new
scale, through the shared scale tensor, so all views of the whole follow; a write through a view of a part keeps the
scale, because the rest of the data stands under it (unless that scale is 0: all zeros adopt any). Results that are no
views never share a scale tensor.

What is lost. Eager mode costs tens of microseconds an operator: it is for looking; compile for speed. Operators without
a rule are refused rather than unscaled silently.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Function
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from isoscale._base.errors import ConfigError
from isoscale.scalify import blocks, registry, scales
from isoscale.scalify import rules as rules  # fills the table
from isoscale.scalify.errors import missing_rule, wrong_scale
from isoscale.scalify.pair import Pair, under, value

_FOREACH = "aten::_foreach_"


@dataclass(frozen=True)
class Options:
    """What a scaled tensor carries beside its two tensors; results inherit it.

    Attributes:
        fallback: operators (`aten.foo.default`) that may run on plain values where they have no rule.
        counts: how often each did.
    """

    fallback: tuple[str, ...] = ()
    counts: Counter[str] = field(default_factory=Counter, compare=False, repr=False)


PLAIN_OPTIONS = Options()


class ScaledTensor(Tensor):
    """value = data * scale.

    Args:
        data: floating point, any shape.
        scale: 0-d float32 tensor, a power of two, or 0 with data that mean the same under every scale. Or a tensor of
            the data's rank with sizes that divide theirs: scales of blocks (`isoscale.scalify.blocks`).
        part: whether it is a view of a part of another one's data.
        options: see `Options`.

    Make one with `as_scaled`; `as_plain` gives the value back.
    """

    _data: Tensor
    _scale: Tensor
    _part: bool
    _options: Options

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor, part: bool = False, options: Options = PLAIN_OPTIONS) -> ScaledTensor:
        out = Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            device=data.device, layout=data.layout, requires_grad=data.requires_grad,
        )  # fmt: skip
        out._data, out._scale, out._part, out._options = data, scale, part, options
        if scale.dim():
            blocks.check(data, scale)
        return out

    @property
    def data_part(self) -> Tensor:
        """The data, about unit RMS: no gradient, not a copy."""
        return self._data

    @property
    def scale(self) -> Tensor:
        """The scale, 0-d float32 or one per block: no copy."""
        return self._scale

    def __tensor_flatten__(self) -> tuple[list[str], tuple[bool, Options, str]]:
        return ["_data", "_scale"], (self._part, self._options, registry.version())

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: tuple[bool, Options, str], size: Any, stride: Any
    ) -> ScaledTensor:
        return ScaledTensor(inner["_data"], inner["_scale"], meta[0], meta[1])

    def _stable_hash_for_caching(self) -> str:
        """What a compiled graph depends on beside shapes and dtypes: the rules."""
        d, s = self._data, self._scale
        shape = (tuple(d.shape), d.stride(), d.dtype, d.device, tuple(s.shape), self._part)
        return repr((type(self).__name__, shape, self._options.fallback, registry.version()))

    def __coerce_same_metadata_as_tangent__(self, meta: Any, kind: type | None = None) -> Tensor:
        if kind is None or kind is ScaledTensor:
            return ScaledTensor(self._data, self._scale, meta[0], meta[1])
        return as_plain(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape, kind = tuple(self.shape), str(self.dtype).removeprefix("torch.")
        grad = ", requires_grad=True" if self.requires_grad else ""
        if type(self._data) not in (Tensor, torch.nn.Parameter) or self._data.is_meta:
            return f"ScaledTensor(shape={shape}, {kind}{grad}, data={self._data!r}, scale={self._scale!r})"
        ends = sorted({float(end) for end in self._scale.aminmax()} if self._scale.numel() else {0.0})
        shown = " to ".join("any" if end == 0 else f"2^{math.log2(end):g}" for end in ends)
        shown += f" of {tuple(self._scale.shape)} blocks" if self._scale.dim() else ""
        rms = float(self._data.double().square().mean().sqrt()) if self.numel() else float("nan")
        small = f", values={as_plain(self.detach(), torch.float32).tolist()}" if 0 < self.numel() <= 8 else ""
        return f"ScaledTensor(shape={shape}, {kind}, scale={shown}, data rms={rms:.3g}{small}{grad})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.rms_norm, torch.nn.functional.rms_norm):
            from isoscale.scalify.norm_op import rms_norm

            return rms_norm(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        options, blocked = _look(args, kwargs)
        if blocked and (found := _on_blocks(func, args, kwargs, options)) is not None:
            return found
        if registry.writes(func) and func not in registry.TABLE:
            if func._schema.name.startswith(_FOREACH):
                return _each(func, args, kwargs)
            return _write(func, args, kwargs, options)
        if func._schema.name.startswith(_FOREACH):
            return _each(func, args, kwargs)
        row = registry.find(func)
        if row is None:
            return _without_rule(func, args, kwargs, options)
        out = row.function(*tree_map(_pair, args), **tree_map(_pair, kwargs))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, ScaledTensor)]
        result = tree_map(lambda leaf: _wrap(leaf, func, given, options), out)
        if func.is_view or registry.writes(func):
            return return_and_correct_aliasing(func, args, kwargs, result)  # type: ignore[no-untyped-call]
        return result


def _look(args: Any, kwargs: Any) -> tuple[Options, bool]:
    """The options of the first scaled tensor that has any, and whether a tensor has block scales."""
    options, blocked = PLAIN_OPTIONS, False
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, ScaledTensor):
            blocked = blocked or leaf._scale.dim() > 0
            if leaf._options.fallback and options is PLAIN_OPTIONS:
                options = leaf._options
    return options, blocked


def _pair(leaf: Any) -> Any:
    """What a rule gets for an argument: block scales are brought under one."""
    if not isinstance(leaf, ScaledTensor):
        return leaf
    pair = Pair(leaf._data, leaf._scale)
    return blocks.together(pair) if leaf._scale.dim() else pair


def _blocks(leaf: Any) -> Any:
    return Pair(leaf._data, leaf._scale) if isinstance(leaf, ScaledTensor) else leaf


def _exact(x: ScaledTensor) -> Pair:
    return blocks.exact(_blocks(x))


def _on_blocks(func: OpOverload, args: Any, kwargs: Any, options: Options) -> Any:
    """An operator that block scales move with or are folded into; None for all others, which get one scale first."""
    out = blocks.run(func, tree_map(_blocks, args), tree_map(_blocks, kwargs))
    if out is None:
        return None
    if not func.is_view:  # its own scales, as every result
        return tree_map(
            lambda pair: ScaledTensor(pair.data, scales.as_tensor(pair.scale, pair.data).clone(), False, options), out
        )
    views = tree_map(lambda pair: ScaledTensor(pair.data, pair.scale, True, options), out)
    return return_and_correct_aliasing(func, args, kwargs, views)  # type: ignore[no-untyped-call]


def _wrap(leaf: Any, func: OpOverload, given: list[ScaledTensor], options: Options) -> Any:
    """A rule's output as a tensor: views share the scale tensor of what they view, all others have their own."""
    if not isinstance(leaf, Pair):
        return leaf
    source = given[0]
    if func.is_view:
        part = source._part or leaf.data.numel() < source.numel()
        return ScaledTensor(leaf.data, source._scale, part, options)
    scale = scales.as_tensor(leaf.scale, leaf.data)
    if any(scale is other._scale for other in given):
        scale = scale.clone()
    return ScaledTensor(leaf.data, scale, False, options)


def _write(func: OpOverload, args: Any, kwargs: Any, options: Options) -> Any:
    """An in-place or out= operator: its functional form's rule, then the result is written into the target."""
    other = registry.functional(func)
    row = registry.TABLE.get(other) if other is not None else None
    schema = func._schema
    targets: list[Any] = []
    plain_args, plain_kwargs = list(args), dict(kwargs)
    for at, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        if at < len(args):
            targets.append(args[at])
        elif argument.name in kwargs:
            targets.append(kwargs[argument.name])
            del plain_kwargs[argument.name]  # out=: the functional form does not take it
    if other is None or row is None:
        raise missing_rule(func, writes=True)
    out = row.function(*tree_map(_pair, plain_args), **tree_map(_pair, plain_kwargs))
    results = list(out) if isinstance(out, (tuple, list)) else [out]
    for target, result in zip(targets, results):
        write(target, result)
    return targets[0] if len(targets) == 1 else tuple(targets)


def write(target: Tensor, result: Pair | Tensor) -> None:
    """Store a rule's result in a tensor that is there.

    A whole tensor takes the result's scale; a view of a part keeps the one that the rest stands under, and blocks keep
    theirs.
    """
    if not isinstance(target, ScaledTensor):
        target.copy_(value(result) if isinstance(result, Pair) else result)
        return
    pair = result if isinstance(result, Pair) else Pair(result, 1.0)
    if target._scale.dim():
        blocks.put(target._data, target._scale, pair)
        return
    scale = scales.as_tensor(pair.scale, target._data)
    if target._part:
        old = target._scale
        scale = torch.where(old == 0, scale, old)
        pair = Pair(under(pair, scale), scale)
    target._data.copy_(pair.data)
    target._scale.copy_(scale)


def _each(func: OpOverload, args: Any, kwargs: Any) -> Any:
    """A foreach operator, element by element through the single one."""
    name = func._schema.name.removeprefix(_FOREACH)
    in_place = name.endswith("_")
    count = next(len(arg) for arg in args if isinstance(arg, (list, tuple)))
    single = {"addcmul": "addcmul", "addcdiv": "addcdiv"}.get(name.rstrip("_"))
    out = []
    for i in range(count):
        given = [arg[i] if isinstance(arg, (list, tuple)) else arg for arg in args]
        named = {key: arg[i] if isinstance(arg, (list, tuple)) else arg for key, arg in kwargs.items()}
        if single is not None and len(given) == 4:
            named["value"] = given.pop()
            if isinstance(named["value"], Tensor):  # a tensor of factors, or one factor
                factor = named.pop("value")
                factor = factor[i] if factor.dim() else factor
                product = given[1] * given[2] if single == "addcmul" else given[1] / given[2]
                out.append(given[0].add_(product * factor) if in_place else given[0] + product * factor)
                continue
        if "scalars" in named:
            named["value"] = named.pop("scalars")
        if name.rstrip("_") == "norm":
            out.append(torch.linalg.vector_norm(given[0], *given[1:], **named))
            continue
        if in_place and not hasattr(Tensor, name):  # maximum_ and minimum_ exist as foreach only
            out.append(given[0].copy_(getattr(torch, name[:-1])(*given, **named)))
            continue
        out.append((getattr(Tensor, name, None) or getattr(torch, name))(*given, **named))
    return None if in_place else out


def _without_rule(func: OpOverload, args: Any, kwargs: Any, options: Options) -> Any:
    """A fallback where the user allowed it: on plain float32 values; results are brought to unit RMS."""
    if func._can_decompose():  # a composite operator, which arrives whole in inference mode
        return func.decompose(*args, **kwargs)
    if str(func) not in options.fallback:
        raise missing_rule(func, writes=False)
    options.counts[str(func)] += 1
    warnings.warn(f"{func} has no scale rule and runs on plain values, as allowed", UserWarning, stacklevel=2)
    low = next(leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, ScaledTensor))
    wide = torch.float64 if low == torch.float64 else torch.float32

    def plain(leaf: Any) -> Any:
        return value(_exact(leaf), wide) if isinstance(leaf, ScaledTensor) else leaf

    out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    return tree_map(lambda leaf: _rescaled(leaf, low, options), out)


def _rescaled(leaf: Any, dtype: torch.dtype, options: Options) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    scale = scales.rms2(leaf)
    return ScaledTensor((leaf / _divisor(scale)).to(dtype), scale, False, options)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


class _ToScaled(Function):
    @staticmethod
    def forward(x: Tensor, scale: Tensor, dtype: torch.dtype, options: Options) -> Tensor:
        data = blocks.encode(x, scale, dtype)
        return ScaledTensor(data.clone() if data is x else data, scale.clone(), False, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return as_plain(grad, ctx.dtype), None, None, None


class _ToPlain(Function):
    @staticmethod
    def forward(x: ScaledTensor, dtype: torch.dtype) -> Tensor:
        return value(_exact(x), dtype)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return as_scaled(grad, dtype=ctx.dtype), None


def as_scaled(
    x: Tensor, scale: float | Tensor | None = None, dtype: torch.dtype | None = None, fallback: Iterable[str] = ()
) -> Tensor:
    """A tensor as data and scale; differentiable.

    Args:
        x: floating point; a scaled tensor is returned as it is, integers and booleans too.
        scale: a power of two that the data are divided by, or a tensor of them, one per block; by default the one
            nearest to the RMS of x, in log space.
        dtype: of the data, by default that of x.
        fallback: names of operators without a rule that may run on plain values (`aten.foo.default`).

    Raises:
        ConfigError: a scale that is no power of two.
    """
    if isinstance(x, ScaledTensor) or not x.is_floating_point():
        return x
    if isinstance(scale, (int, float)) and not scales.is_power_of_two(scale):
        raise wrong_scale(scale)
    found = scales.rms2(x.detach()) if scale is None else torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    names = tuple(sorted(set(fallback)))
    options = Options(names) if names else PLAIN_OPTIONS
    result: Tensor = _ToScaled.apply(x, found, dtype or x.dtype, options)  # type: ignore[no-untyped-call]
    return result


def as_block_scaled(x: Tensor, block: Sequence[int] = (1, 32), dtype: torch.dtype | None = None) -> Tensor:
    """A plain tensor as data and one scale per block; differentiable.

    Args:
        x: floating point.
        block: sizes along the last dimensions, -1 for the whole of one: (1, 32) MX blocks, (1, -1) rows, (-1, 1)
            channels, (128, 128) tiles.
        dtype: of the data, by default that of x. The scale is the power of two not above a block's largest element, in
            fp8 less the format's largest exponent, as in OCP MX.

    Raises:
        ConfigError: a block that does not divide x; a tensor that is scaled already.
    """
    if isinstance(x, ScaledTensor) or not x.is_floating_point():
        raise ConfigError("blocks are made of plain floating-point tensors", key="x", value=type(x).__name__,
                          hint="iso.scalify.as_plain(x)")  # fmt: skip
    kind = dtype or x.dtype
    result: Tensor = _ToScaled.apply(x, blocks.block_scale(x, block, kind), kind, PLAIN_OPTIONS)  # type: ignore[no-untyped-call]
    return result


def as_plain(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The value data * scale as a plain tensor; differentiable.

    Args:
        x: scaled or plain.
        dtype: of the result, by default that of the data. A value beyond it overflows: ask for float32 to be safe.
    """
    if not isinstance(x, ScaledTensor):
        return x if dtype is None else x.to(dtype)
    result: Tensor = _ToPlain.apply(x, dtype or x.dtype)  # type: ignore[no-untyped-call]
    return result


torch.serialization.add_safe_globals([ScaledTensor, Options, Counter])
