"""Norm and convolution modules, drop-in for those of torch.nn. Defaults and roles as in `isoscale.nn.linear`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as torch_f
from torch import Tensor, nn

from isoscale._base.errors import ConfigError
from isoscale.nn import functional as F
from isoscale.nn.constraints import check_constraint
from isoscale.nn.convolution import conv_factors
from isoscale.nn.factors import Factors
from isoscale.nn.linear import Scaling, check_scaling, make_bias, roles_of, weight_grad


class RMSNorm(nn.Module):
    """RMSNorm over the trailing dimensions, without a gain unless `elementwise_affine`. See `functional.rms_norm`.

    `role` is the gain's: `gain`, `finite` where it is shared over heads, `final_norm` after the stack.
    """

    roles: Mapping[str, str]
    weight: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        eps: float = 1e-5,
        elementwise_affine: bool = False,
        *,
        role: str = "gain",
        scaling: Scaling = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_scaling(scaling)
        self.roles = {"weight": role}  # a dict: deepcopy and pickle take no mappingproxy
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps, self.scaling = eps, scaling
        gain = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.register_parameter("weight", gain if elementwise_affine else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def factors(self, tokens: int | None = None) -> Factors:
        """The factors this op uses, for a global row count `tokens`."""
        return Factors(1.0, 1.0, 1.0 if self.scaling == "plain" else weight_grad(tokens))

    def forward(self, x: Tensor, *, tokens: int | None = None) -> Tensor:
        """`[..., *normalized_shape]`, normalised."""
        if self.scaling == "plain":
            return torch_f.rms_norm(x, list(self.normalized_shape), self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps, tokens=tokens)

    def split(
        self, x: Tensor, *, branch_scale: float = 1.0, skip_scale: float = 1.0, tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Open a residual branch: `(norm(x), skip)`. See `functional.norm_split`; plain: no factors."""
        if self.scaling == "plain":
            return self.forward(x), x
        return F.norm_split(
            x, branch_scale=branch_scale, skip_scale=skip_scale, weight=self.weight, eps=self.eps, tokens=tokens
        )

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class LayerNorm(nn.Module):
    """LayerNorm, without gain and bias unless `elementwise_affine`. See `functional.layer_norm`."""

    roles: ClassVar[Mapping[str, str]] = roles_of(weight="gain", bias="bias")
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        eps: float = 1e-5,
        elementwise_affine: bool = False,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps = eps
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            value = nn.Parameter(torch.empty(self.normalized_shape, **kind)) if wanted else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to 1, the bias to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def factors(self, tokens: int | None = None) -> Factors:
        """The factors this op uses, for a global row count `tokens`."""
        return Factors(1.0, 1.0, weight_grad(tokens))

    def forward(self, x: Tensor, *, tokens: int | None = None) -> Tensor:
        """`[..., *normalized_shape]`, normalised."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, tokens=tokens)


class _Conv(nn.Module):
    roles: ClassVar[Mapping[str, str]] = roles_of(weight="hidden", bias="bias")
    dims: ClassVar[int]
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        constraint: str | None = "to_output_scale",
        scale_power: tuple[float, float] = (0.5, 0.5),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ConfigError("groups must divide both channel counts", key="groups", value=groups)
        kernel = (kernel_size,) * self.dims if isinstance(kernel_size, int) else tuple(kernel_size)
        self.stride = (stride,) * self.dims if isinstance(stride, int) else tuple(stride)
        self.padding, self.dilation, self.groups = padding, dilation, groups
        self.constraint, self.scale_power = check_constraint(constraint), scale_power
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *kernel, **kind))
        self.register_parameter("bias", make_bias(out_channels, bias, kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 1), zero the bias."""
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def factors(self, tokens: int | None = None) -> Factors:
        """The factors this op uses, for a global count `tokens` of output positions."""
        pair = conv_factors(tuple(self.weight.shape), self.stride, self.groups, self.constraint, self.scale_power)
        return Factors(*pair, weight_grad(tokens))

    def forward(self, x: Tensor, *, tokens: int | None = None) -> Tensor:
        """See `functional.conv1d` and `functional.conv2d`."""
        op = F.conv1d if self.dims == 1 else F.conv2d
        return op(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.constraint,
            self.scale_power,
            tokens=tokens,
        )


class Conv1d(_Conv):
    """1-D convolution. See `functional.conv1d`; arguments as `torch.nn.Conv1d`, plus `constraint`, `scale_power`."""

    dims: ClassVar[int] = 1


class Conv2d(_Conv):
    """2-D convolution. See `functional.conv2d`; arguments as `torch.nn.Conv2d`, plus `constraint`, `scale_power`."""

    dims: ClassVar[int] = 2
