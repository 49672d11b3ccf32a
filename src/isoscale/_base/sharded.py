"""Which tensors are sharded, without the import of `torch.distributed.tensor`: half a second at every start."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(x: object) -> TypeGuard[DTensor]:
    """Whether x is a DTensor: the one kind of tensor that can be gathered."""
    return hasattr(x, "full_tensor")
