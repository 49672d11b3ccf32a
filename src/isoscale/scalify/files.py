"""State of scaled models on disk: safetensors with `name` (data) and `name.scale` side by side, no pickle.

`torch.save(model.state_dict())` works too. A plain checkpoint goes into a scaled model by `model.load_state_dict`: each
weight is split on the way in, under the power of two nearest to its RMS.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from isoscale._base.errors import CheckpointError
from isoscale.scalify.tensor import ScaledTensor, as_plain

_SCALE = ".scale"


def split_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain tensors only: a scaled `w` becomes `w` (data) and `w.scale`.

    Raises:
        CheckpointError: a plain tensor is called like the scale of another one.
    """
    out: dict[str, Tensor] = {}
    for name, x in state.items():
        if isinstance(x, ScaledTensor):
            out[name], out[name + _SCALE] = x._data.detach().contiguous(), x._scale.detach()
        elif name.endswith(_SCALE) and isinstance(state.get(name.removesuffix(_SCALE)), ScaledTensor):
            raise CheckpointError("two tensors would have one name", key=name)
        else:
            out[name] = x.detach().contiguous()
    return out


def join_state(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `split_state` took apart, for `load_state_dict`."""
    out: dict[str, Tensor] = {}
    for name, x in parts.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in parts:
            continue
        scale = parts.get(name + _SCALE)
        out[name] = x if scale is None else ScaledTensor(x.clone(), scale.clone())
    return out


def plain_state(state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Values, for a plain model's `load_state_dict`.

    Args:
        state: of a scaled model.
        dtype: of what was scaled.
    """
    return {name: as_plain(x.detach(), dtype) if isinstance(x, ScaledTensor) else x.detach()
            for name, x in state.items()}  # fmt: skip


def save_state(state: Mapping[str, Tensor], path: Path | str) -> None:
    """Write a model's scaled state as one safetensors file; tied tensors once for each name.

    Args:
        state: of a model; optimisers' states go through `torch.save`.
        path: of the file.

    Raises:
        CheckpointError: something in the state is no tensor.
    """
    things: Mapping[str, object] = state
    for name, x in things.items():
        if not isinstance(x, Tensor):
            hint = "save_state(model.state_dict(), path); torch.save for an optimiser's"
            raise CheckpointError("a model's state holds tensors", key=str(name), value=type(x).__name__, hint=hint)
    from safetensors.torch import save_file

    save_file({name: x.clone() for name, x in split_state(state).items()}, str(path), {"format": "isoscale-scaled"})


def load_state(path: Path | str) -> dict[str, Tensor]:
    """Read what `save_state` wrote.

    Raises:
        CheckpointError: no such file.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise CheckpointError("no such file", key="path", value=str(path))
    return join_state(load_file(str(path)))
