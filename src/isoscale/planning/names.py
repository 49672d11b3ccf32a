"""One name for one parameter, whatever wraps the model.

DDP, torch.compile, activation checkpointing, FSDP1 and parametrizations insert path segments; rows are keyed by the
name without them, so that a plan made on a bare model fits the wrapped one.
"""

from __future__ import annotations

import re

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_ddp_module"})
_PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original(?=$|\.)")
_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")


def normalise(name: str, *, ddp: bool = False) -> str:
    """The parameter's or module's name without the segments that wrappers add.

    Args:
        name: as `named_parameters` gives it.
        ddp: also strip a leading `module.`, which DDP adds (a user's own module may bear that name, hence a flag).
    """
    parts = [part for part in _PARAMETRIZED.sub(r"\1", name).split(".") if part not in _WRAPPERS]
    if ddp and parts and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def pattern(name: str) -> str:
    """The name with block numbers as `*`: `blocks.3.attn.qkv.weight` -> `blocks.*.attn.qkv.weight`."""
    return _BLOCK.sub("*", name)
