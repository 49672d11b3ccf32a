"""Which parameters LMD trains where no plan says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from isoscale.planning import normalise

_MATRICES = ("input", "hidden", "readout", "router")  # roles of isoscale's own modules
_POSITIONS = ("pos", "cls_token", "class_token", "embed")  # names of bare parameters


def split_parameters(model: nn.Module) -> list[dict[str, Any]]:
    """Groups for `LMD`: weights of linear and convolution layers under LMD, everything else under AdamW.

    Everything else: norms, biases, embeddings (a readout that is tied to one too), positions and class tokens. A plan
    knows more (`plan.param_groups(model)`): it traces what each parameter does.

    Args:
        model: any module; parameters without `requires_grad` are left out.

    Returns:
        Two groups of named parameters.
    """
    aside: set[nn.Parameter] = set()
    for module in model.modules():
        roles: Mapping[str, str] = getattr(module, "roles", {})
        for local, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding) or roles.get(local, "hidden") not in _MATRICES:
                aside.add(p)
    groups: dict[str, list[Any]] = {"lmd": [], "adamw": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = p.dim() < 2 or p in aside or any(word in name.rpartition(".")[2] for word in _POSITIONS)
            groups["adamw" if plain else "lmd"].append((normalise(name), p))
    return [{"params": params, "optimizer": kind} for kind, params in groups.items() if params]
