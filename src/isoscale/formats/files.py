"""Tensors and encoded tensors to safetensors files and back.

A `BlockTensor` called w becomes `w.codes`, `w.scales` and `w.tensor_scale`; what they are stands in the file's metadata
under `isoscale.formats`, as JSON. Any safetensors reader can open the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale._base.files import atomic_write
from isoscale.formats.block import by_name, names
from isoscale.formats.tensor import BlockTensor

KEY = "isoscale.formats"
_PARTS = ("codes", "scales", "tensor_scale")


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes plain and encoded tensors to one safetensors file, atomically.

    Raises:
        ConfigError: two tensors would take one name, or a format that `by_name` does not know (a custom one).
    """
    plain: dict[str, Tensor] = {}
    facts: dict[str, dict[str, object]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ConfigError("only tensors are saved", key=name, value=type(tensor).__name__)
        parts = {name: tensor}
        if isinstance(tensor, BlockTensor):
            label = str(tensor.format)
            if label.split("/")[0] not in names() or by_name(label) != tensor.format:
                hint = "a file names its format, so your own cannot be read back: save .decode() or the parts"
                raise ConfigError("only isoscale's own formats are saved", key=name, value=label, hint=hint)
            facts[name] = {
                "format": label, "axis": tensor.axis, "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }  # fmt: skip
            found = {part: getattr(tensor, part) for part in _PARTS}
            parts = {f"{name}.{part}": value for part, value in found.items() if value is not None}
        for key, value in parts.items():
            if key in plain:
                raise ConfigError("two tensors of one name", key=key)
            plain[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # views may share memory
    atomic_write(Path(path), save(plain, {KEY: json.dumps(facts)}))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads what `save_tensors` wrote; tensors of any other safetensors file come back plain.

    Raises:
        ConfigError: no such file, or none that safetensors can read.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(KEY, "{}"))
            plain = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError) as problem:
        raise ConfigError("cannot read it as safetensors", key="path", value=str(path), hint=str(problem)) from None
    out: dict[str, Tensor] = {}
    for name, fact in facts.items():
        parts = [plain.pop(f"{name}.{part}", None) for part in _PARTS]
        codes = parts[0]
        if codes is None:
            raise ConfigError("the codes of an encoded tensor are missing", key=f"{name}.codes", place=str(path))
        dtype = getattr(torch, fact["dtype"])
        out[name] = BlockTensor(codes, parts[1], parts[2], by_name(fact["format"]), fact["axis"], fact["shape"], dtype)
    return {**plain, **out}
