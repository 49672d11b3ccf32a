"""Which norms feed nothing but linear layers: what MXNorm can take over, found by running the model once.

Names and classes only say where to look. A norm is one if it computes an RMSNorm (it is tried on random rows); its
consumers are the layers that were given its very output, in eval or in training mode. At the end the forward is run
again, in eval mode, with every norm moved into its consumers, in full precision: the result must be the same, so a use
that was not seen cannot pass there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from isoscale import nn as iso_nn
from isoscale._base.errors import PlanError
from isoscale.planning.example import Example, make_example
from isoscale.planning.names import normalise

_SAME = frozenset({"view", "reshape", "flatten", "contiguous", "to", "type", "float", "bfloat16", "half", "clone"})
_LOOKS = frozenset({"__get__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "__repr__"})
_EPS = ("eps", "variance_epsilon", "epsilon")


@dataclass(frozen=True)
class Pair:
    """One norm and the linear layers behind it.

    Args:
        norm: its module's path.
        linears: paths of its consumers, in the order of their first call.
        dim: size of a row.
        eps: of the norm, under its root.
    """

    norm: str
    linears: tuple[str, ...]
    dim: int
    eps: float


@dataclass(frozen=True)
class Pairs:
    """What was found.

    Args:
        pairs: in the order of the model's modules.
        refused: path of a norm in front of a block-scaled linear layer -> why it is not such a pair.
        left: path of any other norm -> why it was left alone.
    """

    pairs: tuple[Pair, ...]
    refused: dict[str, str]
    left: dict[str, str]


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies rows with one weight: torch's, ours, or Hugging Face's Conv1D."""
    hugging_face = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return isinstance(module, nn.Linear | iso_nn.Linear) or hugging_face


def find_pairs(
    model: nn.Module, example: object = None, *, casts: Callable[[str], bool] = lambda path: True,
    skip: Sequence[str] = (),
) -> Pairs:  # fmt: skip
    """Norms that feed linear layers and nothing else.

    Args:
        model: any module; run in eval mode without gradients, and left as it was.
        example: input of one forward, as for `iso.plan`; None to guess.
        casts: whether the linear layer at a path is cast to a block format. Norms in front of one that is not, such as
            the head, are left alone.
        skip: patterns of norms to leave as they are.

    Raises:
        PlanError: no example could be guessed, or moving the norms changes the model's output.
    """
    if hasattr(model, "_orig_mod"):
        raise PlanError("a compiled model hides what its norms feed", key="model", value=type(model).__name__,
                        hint="convert first, then torch.compile")  # fmt: skip
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    inputs = make_example(model, example)
    norms = {path: module for path, module in model.named_modules() if _looks_like_a_norm(module)}
    for name in skip:
        if not any(fnmatchcase(normalise(path), name) for path in norms):
            hint = "norms: " + ", ".join(list(norms)[:4])
            raise PlanError("no norm has such a name", key="norm_skip", value=name, hint=hint)
    uses = _watch(model, norms, inputs)
    pairs, refused, left = [], {}, {}
    for path, module in norms.items():
        linears = [use.path for use in uses[path] if use.linear]
        if any(fnmatchcase(normalise(path), name) for name in skip):
            left[path] = "skipped"
            continue
        if not any(casts(linear) for linear in linears):
            other = ", ".join(dict.fromkeys(use.path for use in uses[path])) or "nothing"
            left[path] = f"its output goes to no block-scaled linear layer, but to {other}"
            continue
        reason = _why_not(model, module, uses[path], casts)
        if reason:
            refused[path] = reason
        else:
            unique = tuple(dict.fromkeys(linears))
            pairs.append(Pair(path, unique, _dim(module), float(_eps(module) or 0.0)))
    found = Pairs(tuple(pairs), refused, left)
    if pairs and not refused:
        _verify(model, found.pairs, inputs)
    return found


@dataclass(frozen=True)
class _Use:
    path: str
    linear: bool


def _looks_like_a_norm(module: nn.Module) -> bool:
    """RMSNorm and LayerNorm by class; else by what it owns: one vector, an eps, a name with Norm in it."""
    if isinstance(module, nn.RMSNorm | nn.LayerNorm | iso_nn.RMSNorm | iso_nn.LayerNorm):
        return True
    named = "norm" in type(module).__name__.lower() and not any(True for _ in module.children())
    return named and all(p.dim() == 1 for p in module.parameters(recurse=False)) and _eps(module) is not None


def _eps(module: nn.Module) -> float | None:
    found = next((getattr(module, name) for name in _EPS if hasattr(module, name)), None)
    if found is None and isinstance(module, nn.RMSNorm):
        weight = module.weight
        return float(torch.finfo(weight.dtype if weight is not None else torch.float32).eps)
    return None if found is None else float(found)


def _dim(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return int(weight.numel())
    shape = getattr(module, "normalized_shape", (0,))
    return int(torch.Size(shape).numel())


def _why_not(model: nn.Module, module: nn.Module, uses: list[_Use], casts: Callable[[str], bool]) -> str:
    """Why a norm cannot be taken over, in one line; empty where it can."""
    name = type(module).__name__
    gains = [key for key, _ in module.named_parameters(recurse=False) if key not in ("weight", "bias")]
    if gains:
        return f"{name} calls its gain {gains[0]!r}, not 'weight'"
    if isinstance(module, nn.LayerNorm | iso_nn.LayerNorm) or "layernorm" in name.lower():
        return f"{name} subtracts the mean of the row, which block maxima do not know"
    if getattr(module, "bias", None) is not None:
        return f"{name} adds a bias, which an encoded tensor cannot take"
    if len(getattr(module, "normalized_shape", (1,))) != 1:
        return f"{name} normalises over several dimensions"
    other = [use.path for use in uses if not use.linear]
    if other:
        return f"its output also goes to {other[0]}, which needs it normalised"
    plain = [use.path for use in uses if use.linear and not casts(use.path)]
    if plain:
        return f"its output also goes to {plain[0]}, which the recipe casts to no block format"
    return _not_rms(module)


def _not_rms(module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    kind = {"dtype": torch.float32, "device": weight.device if isinstance(weight, Tensor) else None}
    if isinstance(weight, Tensor) and weight.is_meta:
        return ""
    rows = torch.linspace(-2, 3, 3 * _dim(module), **kind).view(3, -1).sin() * 1.7  # type: ignore[arg-type]
    with torch.no_grad():
        rows = rows.to(weight.dtype) if isinstance(weight, Tensor) else rows
        said = module(rows).float()
        normed = rows.float() * torch.rsqrt(rows.float().square().mean(-1, keepdim=True) + (_eps(module) or 0.0))
        gain = weight.float() if isinstance(weight, Tensor) else torch.ones((), device=normed.device)
        close = 2e-2 if rows.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if torch.allclose(said, normed * gain, rtol=close, atol=close):
            return ""
        if torch.allclose(said, normed * (1 + gain), rtol=close, atol=close):
            return f"the gain of {type(module).__name__} is 1 + weight, not weight"
    return f"{type(module).__name__} does not compute x / sqrt(mean(x^2) + eps) * weight"


class _Watch(TorchFunctionMode):
    """Follows the outputs of norms until somebody uses them."""

    def __init__(self, norms: dict[str, nn.Module]) -> None:
        super().__init__()
        self.of: dict[int, str] = {}
        self.alive: list[Tensor] = []  # so that no id is given twice
        self.uses: dict[str, list[_Use]] = {path: [] for path in norms}
        self.inside = 0

    def watch(self, tensor: Tensor, path: str) -> None:
        self.of[id(tensor)] = path
        self.alive.append(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.inside:
            return out
        name = getattr(func, "__name__", str(func))
        if name in _LOOKS:
            return out
        for value in tree_flatten((args, kwargs or {}))[0]:
            path = self.of.get(id(value)) if isinstance(value, Tensor) else None
            if path is None:
                continue
            if name in _SAME and isinstance(out, Tensor) and out.shape[-1:] == value.shape[-1:]:
                self.watch(out, path)
            else:
                self.uses[path].append(_Use(name, False))
        return out


def _watch(model: nn.Module, norms: dict[str, nn.Module], inputs: Example) -> dict[str, list[_Use]]:
    watch = _Watch(norms)

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not watch.inside:
                for value in tree_flatten((args, kwargs))[0]:
                    norm = watch.of.get(id(value)) if isinstance(value, Tensor) else None
                    if norm is not None:
                        watch.uses[norm].append(_Use(path, True))
            watch.inside += 1

        return hook

    def leave(*_: Any) -> None:
        watch.inside -= 1

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if is_linear(module):
                handles = (module.register_forward_pre_hook(enter(path), with_kwargs=True),
                           module.register_forward_hook(leave, always_call=True))  # fmt: skip
                for handle in handles:
                    stack.callback(handle.remove)
        for path, module in norms.items():
            stack.enter_context(_output_of(module, _seen(watch, path)))
        for training in (False, True):
            _forward(model, inputs, watch, training)
    return watch.uses


def _seen(watch: _Watch, path: str) -> Callable[[Tensor, Tensor], Tensor]:
    def see(x: Tensor, out: Tensor) -> Tensor:
        watch.watch(out, path)
        return out

    return see


@contextmanager
def _output_of(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """`change(input, output)` sees, and may replace, what a norm gives: by its forward, or by `split` of our own."""
    handle = module.register_forward_hook(lambda _, args, out: change(args[0], out))
    split = getattr(module, "split", None)
    if split is not None:

        def looked(x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
            out, skip = split(x, **kwargs)
            return change(x, out), skip

        module.split = looked  # type: ignore[assignment]  # hides the method until it is deleted
    try:
        yield
    finally:
        handle.remove()
        if split is not None:
            del module.split


def _forward(
    model: nn.Module, inputs: Example, mode: TorchFunctionMode | None = None, training: bool = False
) -> list[Tensor]:
    """The output's tensors; buffers that a forward in training mode would move are put back."""
    was = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    model.train(training)
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), ExitStack() as stack:
            torch.manual_seed(0)
            if mode is not None:
                stack.enter_context(mode)
            out = model(*inputs.args, **inputs.kwargs)
    except Exception as error:
        raise PlanError(
            f"the forward of {type(model).__name__} failed on {inputs.said}: {type(error).__name__}: {error}",
            key="example", hint=f"give example= (a tensor, a tuple or a dict) for forward{inputs.signature}",
        ) from error  # fmt: skip
    finally:
        for module, mode_ in was.items():
            module.training = mode_
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return [value for value in tree_flatten(dict(out) if hasattr(out, "keys") else out)[0] if isinstance(value, Tensor)]


def _verify(model: nn.Module, pairs: Sequence[Pair], inputs: Example) -> None:
    """Moves every norm into its consumers, in full precision, and compares outputs."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    before = _forward(model, inputs)
    with ExitStack() as stack:
        for pair in pairs:
            norm = model.get_submodule(pair.norm)
            stack.enter_context(_output_of(norm, lambda x, out: x))
            for path in pair.linears:
                handle = model.get_submodule(path).register_forward_pre_hook(_normalising(norm))
                stack.callback(handle.remove)
        after = _forward(model, inputs)
    for a, b in zip(before, after):
        if a.is_floating_point() and not torch.allclose(
            a.float(), b.float(), rtol=2e-2, atol=2e-2 * float(a.float().abs().mean())
        ):
            raise PlanError(
                "a norm's output is used in a way that was not seen: moving the norms changes the model's output",
                key="norm", hint="name the norms to leave alone: norm_skip=('pattern', ...)",
            )  # fmt: skip


def _normalising(norm: nn.Module) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (norm.forward(args[0]), *args[1:])  # forward itself, so that the norm's own hook does not see it

    return hook
