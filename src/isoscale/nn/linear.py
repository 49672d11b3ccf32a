"""Matmul modules: Linear, LinearReadout, Embedding, drop-in for those of torch.nn.

Defaults: no bias, norms without parameters, weights from N(0, 1), biases zero (the factors live in the ops, so that no
init depends on a width). A class that owns parameters names the role of each in `roles`; parameters carry no
attributes. `scaling="plain"` turns the matmul modules into their standard twins, the baseline of every comparison:
torch's own ops, no factors, N(0, 1/fan_in) weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as torch_f
from torch import Tensor, nn

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.nn import factors as _factors
from isoscale.nn import functional as F
from isoscale.nn.constraints import check_constraint
from isoscale.nn.factors import Factors, token_scale
from isoscale.nn.gemm import scaled_linear
from isoscale.nn.scale import times

Scaling = Literal["unit", "plain"]


def roles_of(**roles: str) -> Mapping[str, str]:
    """An immutable mapping of local parameter name to role."""
    return MappingProxyType(roles)


def check_scaling(scaling: str) -> None:
    """Raise `ConfigError` unless `scaling` is "unit" or "plain"."""
    if scaling not in ("unit", "plain"):
        hint = did_you_mean(scaling, ("unit", "plain"))
        raise ConfigError("unknown scaling", key="scaling", value=scaling, hint=hint)


def weight_grad(tokens: int | None) -> float | None:
    """`tokens^-1/2`, None while unknown."""
    return None if tokens is None else token_scale(tokens, 1)


def draw(weight: Tensor, std: float) -> None:
    """A normal start. On the meta device there is nothing to draw, and torch would import its compiler: a second."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


def make_bias(size: int, wanted: bool, kind: Mapping[str, Any]) -> nn.Parameter | None:
    """An uninitialised vector parameter, or None."""
    return nn.Parameter(torch.empty(size, **kind)) if wanted else None


class Linear(nn.Module):
    """A linear map whose scales ride in its GEMMs. See `functional.linear` and `gemm.scaled_linear`.

    Args:
        in_features: fan-in.
        out_features: fan-out.
        bias: add a bias.
        constraint: merges the factors of output and input gradient; None keeps them apart.
        scale_power: exponents of fan-in (output) and fan-out (input gradient).
        grad_fan_out: fan-out that the input-gradient factor counts; default `out_features`. A fused projection whose
            parts mirror separate layers gives the fan-out of one part.
        scaling: "unit", or "plain" for the standard twin.
        device: as in torch.
        dtype: as in torch.
    """

    roles: ClassVar[Mapping[str, str]] = roles_of(weight="hidden", bias="bias")
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        constraint: str | None = "to_output_scale",
        scale_power: tuple[float, float] = (0.5, 0.5),
        *,
        grad_fan_out: int | None = None,
        scaling: Scaling = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_scaling(scaling)
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ConfigError("a linear needs at least one feature", key=name, value=value)
        self.in_features, self.out_features = in_features, out_features
        self.constraint, self.scale_power = check_constraint(constraint), scale_power
        self.grad_fan_out, self.scaling = grad_fan_out or out_features, scaling
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **kind))
        self.register_parameter("bias", make_bias(out_features, bias, kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, zero the bias."""
        if self.weight is not None:  # a tied readout has none
            draw(self.weight, 1.0 if self.scaling == "unit" else self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def factors(self, tokens: int | None = None) -> Factors:
        """The factors this op uses, for a global row count `tokens`."""
        if self.scaling == "plain":
            return Factors(1.0, 1.0, 1.0)
        pair = _factors.linear_factors(self.in_features, self.grad_fan_out, self.constraint, self.scale_power)
        return Factors(*pair, weight_grad(tokens))

    def forward(
        self,
        x: Tensor,
        *,
        pending: float = 1.0,
        skip: Tensor | None = None,
        branch_scale: float = 1.0,
        skip_scale: float = 1.0,
        tokens: int | None = None,
    ) -> Tensor:
        """`branch_scale * linear(pending * x) + skip_scale * skip`.

        Args:
            x: `[..., in]`.
            pending: factor that the op before deferred; acts forward and backward.
            skip: `[..., out]`; unit: its gradient and the branch's pass with factor 1.
            branch_scale: forward factor of the branch.
            skip_scale: forward factor of the skip.
            tokens: global row count for the weight gradient; None counts the rows of `x`.

        Returns:
            `[..., out]`.
        """
        assert self.weight is not None
        return self._run(self.weight, x, pending, skip, branch_scale, skip_scale, tokens)

    def _run(
        self,
        weight: Tensor,
        x: Tensor,
        pending: float,
        skip: Tensor | None,
        branch_scale: float,
        skip_scale: float,
        tokens: int | None,
    ) -> Tensor:
        if self.scaling == "plain":
            out = times(torch_f.linear(x, weight, self.bias), pending * branch_scale)
            return out if skip is None else times(skip, skip_scale) + out
        factors = self.factors()
        return scaled_linear(
            x,
            weight,
            self.bias,
            forward=factors.forward,
            input_grad=factors.input_grad,
            tokens=tokens,
            pending=pending,
            skip=skip,
            branch_scale=branch_scale,
            skip_scale=skip_scale,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, scaling={self.scaling!r}"


class LinearReadout(Linear):
    """The last linear: output factor `1/fan_in`, input-gradient factor `fan_out^-1/2`. See `functional.linear_readout`.

    `multiplier` is a plain float on the logits (muP's readout multiplier), 1 under u-muP. With `tied=True` the module
    owns no weight and `forward` is given one, usually that of the embedding.
    """

    roles: ClassVar[Mapping[str, str]] = roles_of(weight="readout", bias="bias")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        constraint: str | None = None,
        scale_power: tuple[float, float] = (1.0, 0.5),
        *,
        tied: bool = False,
        scaling: Scaling = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, constraint, scale_power, scaling=scaling, device=device, dtype=dtype
        )
        self.multiplier = 1.0
        if tied:
            self.register_parameter("weight", None)

    def forward(
        self,
        x: Tensor,
        *,
        pending: float = 1.0,
        skip: Tensor | None = None,
        branch_scale: float = 1.0,
        skip_scale: float = 1.0,
        tokens: int | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """As `Linear.forward`, times `multiplier`; `weight [out, in]` stands in for the own one."""
        used = self.weight if weight is None else weight
        if used is None:
            raise ConfigError("a tied readout is given its weight at every call", key="weight")
        return self._run(used, x, pending * self.multiplier, skip, branch_scale, skip_scale, tokens)


class Embedding(nn.Module):
    """A lookup table `[vocab, width]`. See `functional.embedding`.

    `multiplier` is a plain float on the output (muP's alpha_emb), 1 under u-muP.
    """

    roles: ClassVar[Mapping[str, str]] = roles_of(weight="embedding")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scaling: Scaling = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_scaling(scaling)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.scaling = scaling
        self.multiplier = 1.0
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew (unit: N(0, 1); plain: std 0.02), zero the padding row."""
        draw(self.weight, 1.0 if self.scaling == "unit" else 0.02)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()

    def factors(self, tokens: int | None = None) -> Factors:
        """The factors this op uses, for a global token count `tokens`."""
        if self.scaling == "plain":
            return Factors(1.0, 1.0, 1.0)
        return Factors(1.0, 1.0, None if tokens is None else (self.num_embeddings / tokens) ** 0.5)

    def forward(self, ids: Tensor, *, tokens: int | None = None) -> Tensor:
        """`[...]` integers to `[..., width]`."""
        if self.scaling == "plain":
            out = torch_f.embedding(ids, self.weight, self.padding_idx)
        else:
            out = F.embedding(ids, self.weight, self.padding_idx, tokens=tokens)
        return times(out, self.multiplier)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scaling={self.scaling!r}"
