"""Norms that take part in the casts: which there are, and what they take over in a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from isoscale._base.errors import PlanError
from isoscale.formats import BlockFormat
from isoscale.formats.recipes import LayerFormats
from isoscale.nn.cast_linear import CastLinear
from isoscale.nn.mxnorm_linear import MXNormGain, MXNormLinear
from isoscale.numerics.pairs import find_pairs

NORMS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "mxnorm": MappingProxyType({"p": 2}),
    "mxnorm-fine": MappingProxyType({"p": 2, "statistic_block": 8}),
    "mxnorm-p1": MappingProxyType({"p": 1}),
    "mxnorm-ride": MappingProxyType({"p": 2, "ride": True}),
    "mxnorm-rounded": MappingProxyType({"p": 1, "estimate": "rounded"}),
})  # fmt: skip
"""Name -> settings of `isoscale.nn.MXNormLinear`. `mxnorm-rounded` is UNSTABLE: for comparison only."""


class Takeover:
    """The norms of a model that linear layers will do the work of.

    Args:
        model: any module.
        norm: a name of `NORMS`.
        formats: of each linear layer, by its path; PLAIN for one that is not cast.
        example: input of one forward; None to guess.
        skip: patterns of norms to leave as they are.

    Raises:
        PlanError: no norm could be taken over, or one in front of a block-scaled layer cannot be; says which and why.
    """

    def __init__(
        self, model: nn.Module, norm: str, formats: Callable[[str], LayerFormats], example: object, skip: Sequence[str]
    ) -> None:
        self.model, self.settings = model, dict(NORMS[norm])

        def in_blocks(path: str) -> bool:
            fmt = formats(path).format_of("input")
            return isinstance(fmt, BlockFormat) and fmt.block[0] == 1 and fmt.block[1] > 0

        found = find_pairs(model, example, casts=in_blocks, skip=skip)
        if found.refused:
            by_reason: dict[str, list[str]] = {}
            for path, reason in found.refused.items():
                by_reason.setdefault(reason, []).append(path)
            lines = [", ".join(paths[:2]) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "") + f": {reason}"
                     for reason, paths in by_reason.items()]  # fmt: skip
            hint = "an RMSNorm without bias can be; norm_skip=('pattern', ...) leaves norms as they are"
            raise PlanError("MXNorm cannot take over " + "; ".join(lines), key="norm", value=norm, hint=hint)
        if not found.pairs:
            hint = "a pair is an RMSNorm whose output goes to block-scaled linear layers and nowhere else"
            seen = "; ".join(f"{path}: {reason}" for path, reason in list(found.left.items())[:3])
            raise PlanError("this model has no norm that MXNorm could take over", key="norm", value=norm,
                            place=seen or "it has no norm", hint=hint)  # fmt: skip
        self.gains: dict[str, MXNormGain] = {}
        self.of: dict[str, MXNormGain] = {}
        for pair in found.pairs:
            own = model.get_submodule(pair.norm)
            gain = MXNormGain(pair.dim, pair.eps, getattr(own, "weight", None), getattr(own, "roles", None))
            gain.train(own.training)
            self.gains[pair.norm] = gain
            self.of |= dict.fromkeys(pair.linears, gain)

    def layer(self, path: str, linear: nn.Module, formats: LayerFormats, backend: str) -> CastLinear:
        """What stands in for a linear layer: with the norm before it, where there is one to take over."""
        if path not in self.of:
            return CastLinear(linear, formats, backend)
        return MXNormLinear.of(self.of[path], linear, formats, backend, **self.settings)

    def place(self) -> None:
        """Puts gains where norms stood."""
        for path, gain in self.gains.items():
            parent, _, leaf = path.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, gain)


def fold(model: nn.Module) -> nn.Module:
    """For inference: multiplies every gain that MXNorm took over into the weights behind it, once, in place.

    The weights become W gamma, as they were cast in every forward before, and the gains become 1; names and shapes
    stay, so that the state loads into the model before its conversion as well, and means the same there.

    Args:
        model: converted with `norm="mxnorm"`, or made of `MXNormLinear`.

    Raises:
        PlanError: the model has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, MXNormLinear)]
    if not layers:
        raise PlanError("the model has no MXNormLinear", key="model", value=type(model).__name__,
                        hint='isoscale.numerics.convert(model, recipe, norm="mxnorm") first')  # fmt: skip
    gains = [layer.fold_gain() for layer in layers]
    with torch.no_grad():
        for gain in gains:  # only now: several layers may share one
            if gain is not None:
                gain.fill_(1.0)
    return model
