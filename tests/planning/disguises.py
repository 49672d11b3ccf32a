"""The same model under another look: other names, another order of registration, unknown classes around its parts.

What a disguise leaves alone are the keys of lists and sequences: they are positions, not names. The forward still runs,
by the old attribute names, while `named_parameters` shows the new ones.
"""

from __future__ import annotations

import hashlib
import random
from functools import cache
from typing import Any

from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential)


def _alias(owner: str, name: str, seed: int) -> str:
    return "n" + hashlib.sha256(f"{seed} {owner} {name}".encode()).hexdigest()[:8]


@cache
def _renamed_class(kind: type[nn.Module], seed: int) -> type[nn.Module]:
    def lookup(self: nn.Module, name: str) -> Any:
        alias = _alias(kind.__qualname__, name, seed)
        return kind.__getattr__(self, alias if alias in self._parameters or alias in self._modules else name)

    return type(f"Renamed{kind.__name__}", (kind,), {"__getattr__": lookup})


def rename(model: nn.Module, seed: int) -> nn.Module:
    """Every submodule and parameter under a random name, in place; the same one at every size of a class."""
    for module in list(model.modules()):
        kind = type(module)
        tables: list[dict[str, Any]] = [module._parameters]
        if not isinstance(module, _LISTS):
            tables.append(module._modules)
        for table in tables:
            items = list(table.items())
            table.clear()
            table.update({_alias(kind.__qualname__, name, seed): value for name, value in items})
        module.__class__ = _renamed_class(kind, seed)
    return model


def reorder(model: nn.Module, seed: int) -> nn.Module:
    """Submodules and parameters registered in random order, in place."""
    draw = random.Random(seed)
    for module in list(model.modules()):
        tables: list[dict[str, Any]] = [module._parameters]
        if not isinstance(module, _LISTS):
            tables.append(module._modules)
        for table in tables:
            items = list(table.items())
            draw.shuffle(items)
            table.clear()
            table.update(items)
    return model


class Box(nn.Module):
    """A class that nothing knows: it holds a module and calls it."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__["_modules"]["held"]
        return held if name == "held" else getattr(held, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.held(*args, **kwargs)


def box(model: nn.Module, seed: int) -> nn.Module:
    """Two of three submodules, by the name they have, each in a `Box`; in place."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            chosen = isinstance(module, _LISTS) or int(_alias(type(module).__qualname__, name, seed)[1:], 16) % 3
            if child is not None and chosen and not isinstance(child, _LISTS):
                module._modules[name] = Box(child)
    return model
