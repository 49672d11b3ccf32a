"""The tensors of one forward pass, by name and in forward order.

What is looked at: the output of every leaf module, and of every repeated block (the residual stream). isoscale's
decoder folds residual adds into its linears, so its own probe is used instead, which sees logical values. A plan may
put a branch's multiplier into the weight that ends the branch; the output of that layer is divided by it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isoscale.check.task import Task
from isoscale.models import Decoder
from isoscale.planning import normalise

_SILENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_SITE_KINDS = {
    "embedding": "embedding", "norm": "norm", "attn_logits": "attention", "attn_out": "attention", "ffn_act": "mlp",
    "residual_attn": "residual stream", "residual_ffn": "residual stream", "readout": "logits", "loss_logits": "logits",
}  # fmt: skip
KINDS = ("embedding", "norm", "attention", "mlp", "other", "residual stream", "logits")


@dataclass(frozen=True)
class Seen:
    """A tensor of the forward pass.

    Args:
        kind: one of `KINDS`.
        value: detached, in fp32.
    """

    kind: str
    value: Tensor


def stacks(model: nn.Module) -> dict[str, int]:
    """Containers of repeated blocks and how many they hold: `{"model.layers": 4}`."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            kinds = {type(child) for child in module}
            if len(kinds) == 1 and any(True for _ in module[0].children()):
                found[normalise(path)] = len(module)
    return found


def _kind(path: str, module: nn.Module, block: bool) -> str:
    if block:
        return "residual stream"
    if isinstance(module, nn.Embedding) or "embed" in type(module).__name__.lower():
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "norm"
    words = path.lower()
    if "attn" in words or "attention" in words:
        return "attention"
    return "mlp" if any(word in words for word in ("mlp", "ffn", "feed", "fc", "intermediate")) else "other"


def _tensor(output: Any) -> Tensor | None:
    """The first tensor of real numbers in what a module returned."""
    parts = output if isinstance(output, tuple | list) else (output,)
    return next((part for part in parts if isinstance(part, Tensor) and part.is_floating_point()), None)


def _hooked(model: nn.Module, factors: Mapping[str, float], run: Callable[[], object]) -> dict[str, Seen]:
    found: dict[str, Seen] = {}
    blocks = {f"{container}.{i}" for container, count in stacks(model).items() for i in range(count)}

    def hook(path: str, block: bool) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, args: object, output: object) -> None:
            if (value := _tensor(output)) is not None:
                name = path if path not in found else f"{path}#{sum(key.split('#')[0] == path for key in found)}"
                found[name] = Seen(_kind(path, module, block), value.detach().float() / factors.get(path, 1.0))

        return look

    handles = []
    for raw, module in model.named_modules():
        path = normalise(raw)
        leaf = not any(True for _ in module.children())
        if path and (path in blocks or leaf) and not isinstance(module, _SILENT):
            handles.append(module.register_forward_hook(hook(path, path in blocks)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        last = next(reversed(found))
        found[last] = Seen("logits", found[last].value)
    return found


def _probed(model: Decoder, batch: Any) -> dict[str, Seen]:
    kinds = {(site.path, site.port): site.kind for site in model.sites()}
    found: dict[str, Seen] = {}

    def look(path: str, port: str, value: Tensor, factor: float) -> None:
        kind = kinds[path, port]
        group = _SITE_KINDS.get(kind, "attention" if ".attn" in path else "mlp")
        name = path if port == "out" else f"{path}.{port}" if path else port
        found[name] = Seen(group, value.detach().float() * factor)

    model(*batch, probe=look)
    return found


@torch.no_grad()
def capture(model: nn.Module, task: Task, batch: Any, factors: Mapping[str, float] | None = None) -> dict[str, Seen]:
    """Name -> tensor, in forward order; a module that is called again has `#1`, `#2` after its name.

    Args:
        model: what is looked at.
        task: runs it.
        batch: on which.
        factors: module path -> the multiplier that its weights hold.
    """
    if isinstance(model, Decoder):
        return _probed(model, batch)
    return _hooked(model, factors or {}, lambda: task.loss(model, batch))
