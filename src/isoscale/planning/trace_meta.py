"""Plausible answers for what the meta device cannot know, so that data-dependent forwards trace there too.

`nonzero` finds everything and returns real indices on the CPU (up to a size), because loops over experts ask each index
for its number; other answers are shaped like the smallest result. Calls that then mix CPU indices with meta tensors
are brought to one device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_LARGEST = 1024  # elements whose nonzero is answered in full
# Torch computes the extents of these in Python, slowly, and a large model is made of thousands of them.
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "neg", "pow", "rsqrt", "silu", "gelu", "exp", "tanh"})
Answer = tuple[bool, Any]


def _first(args: tuple[Any, ...]) -> Any:
    return args[0] if args else None


def _meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _any_meta(value: Any) -> bool:
    return _meta(value) or (isinstance(value, (list, tuple)) and any(_any_meta(item) for item in value))


def on_one_device(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], moved: Callable[[torch.Tensor, torch.Tensor], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with CPU tensors of rank > 0 taken to meta when another argument is there.

    Args:
        args: of the call.
        kwargs: of the call.
        moved: told (old, new) of each tensor taken over.
    """
    if not (_any_meta(args) or _any_meta(list(kwargs.values()))):
        return args, dict(kwargs)

    def take(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim() > 0:
            new = value.to("meta")
            moved(value, new)
            return new
        if isinstance(value, (list, tuple)):
            return [take(item) for item in value]
        return value

    def indices(value: Any) -> Any:
        """Truth masks become the integer indices of all their elements."""
        if _meta(value) and value.dtype == torch.bool and value.dim() > 0:
            rows = torch.empty(value.numel(), dtype=torch.long, device="meta")
            return [rows] * value.dim()
        return [value]

    taken = tuple(take(value) for value in args)
    if len(taken) > 1 and isinstance(taken[1], list) and any(_meta(i) and i.dtype == torch.bool for i in taken[1]):
        taken = (taken[0], [new for value in taken[1] for new in indices(value)], *taken[2:])
    return taken, {key: take(value) for key, value in kwargs.items()}


def _everything(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() and 0 < tensor.numel() <= _LARGEST:
        return torch.ones(tensor.shape, dtype=torch.bool).nonzero()
    return torch.zeros(min(tensor.numel(), 1), tensor.dim(), dtype=torch.long)


def answer(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], made_by: Callable[[torch.Tensor], str]
) -> Answer:
    """(True, made-up result) where the call cannot run on meta, else (False, None).

    Args:
        name: the operator's name.
        args: of the call.
        kwargs: of the call.
        made_by: the operator that made a tensor.
    """
    x = _first(args)
    if name == "copy_" and len(args) > 1 and _meta(args[1]) and not _meta(x):
        return True, x
    if not _meta(x):
        return False, None
    if name in _ELEMENTWISE and not kwargs:
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if all(tensor.is_meta and tensor.dtype == x.dtype and x.is_floating_point() for tensor in tensors):
            alike = all(tensor.shape == x.shape for tensor in tensors)
            shape = x.shape if alike else torch.broadcast_tensors(*tensors)[0].shape  # type: ignore[no-untyped-call]
            return True, x.new_empty(shape)
    if name == "_local_scalar_dense":
        zero = torch.zeros((), dtype=x.dtype).item()
        return True, True if x.dtype == torch.bool and made_by(x) == "all" else zero
    if name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type != "meta":
        return True, torch.ones(x.shape, dtype=kwargs.get("dtype") or x.dtype)
    if name in ("equal", "is_nonzero"):
        return True, True
    if name == "nonzero":
        return True, _everything(x)
    if name == "masked_select":
        return True, x.new_empty(x.numel())
    if name == "_grouped_mm" and args[1].dim() == 3:  # its meta kernel knows bf16 only
        return True, x.new_empty(*x.shape[:-1], args[1].shape[-1])
    if name == "bincount":
        return True, x.new_ones(max(int(kwargs.get("minlength", args[2] if len(args) > 2 else 1)), 1))
    if name == "repeat_interleave" and len(args) == 1:
        return True, x.new_zeros(int(kwargs.get("output_size") or x.numel()))
    if name in ("_unique2", "_unique", "unique_dim", "unique_consecutive"):
        counts = x.new_ones(1, dtype=torch.long)
        return True, (x.new_zeros(1), x.new_zeros(x.shape, dtype=torch.long), counts)
    return False, None
