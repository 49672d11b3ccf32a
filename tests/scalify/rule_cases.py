"""One case or more for every operator of the rule table, written once for plain tensors and for pairs.

A case is a function of `c`, which calls an operator (or its rule), and `g`, which makes inputs (or pairs) from data of
unit RMS and a power-of-two scale. Run both ways it gives the oracle: the value of what the rule gives is what the
operator gives on the values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import isoscale.scalify  # noqa: F401  fills the table
from isoscale.scalify import registry
from isoscale.scalify.pair import Pair

aten = torch.ops.aten
INF = float("inf")


def op_named(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


@dataclass
class Inputs:
    """Makes inputs.

    Attributes:
        seed: of data and scales.
        n: the size that cases use.
        span: exponents of scales are drawn from -span to span.
        dtype: of the data.
        pairs: give pairs instead of values.
        tensors: scales as 0-d tensors instead of numbers.
        correlated: data have a mean of 0.9.
        exponent: of every scale, instead of drawn ones.
        plain_dtype: of the values.
        special: "zeros" (under any scale), "any" (zeros and infinities under any scale), "some" (an infinity and a NaN).
    """

    seed: int = 0
    n: int = 6
    span: int = 40
    dtype: torch.dtype = torch.float64
    pairs: bool = False
    tensors: bool = False
    correlated: bool = False
    exponent: int | None = None
    plain_dtype: torch.dtype = torch.float64
    special: str = ""

    def __post_init__(self) -> None:
        self.data = torch.Generator().manual_seed(self.seed)
        self.scales = torch.Generator().manual_seed(self.seed + 1)

    def pack(self, data: Tensor) -> Any:
        drawn = int(torch.randint(-self.span, self.span + 1, (), generator=self.scales).item())
        scale = 2.0 ** (drawn if self.exponent is None else max(-self.span, min(self.span, self.exponent)))
        data = data.to(self.dtype)
        if self.special in ("zeros", "any"):
            pattern = torch.tensor([0.0, INF, -INF] if self.special == "any" else [0.0], dtype=self.dtype)
            data = pattern[torch.arange(data.numel()) % len(pattern)].reshape(data.shape)
            scale = 0.0 if self.pairs else 1.0
        elif self.special == "some" and data.numel() > 1:
            data = data.clone()
            data.view(-1)[0], data.view(-1)[-1] = INF, float("nan")
        if self.pairs:
            return Pair(data, torch.tensor(scale) if self.tensors else scale)
        return (data.double() * scale).to(self.plain_dtype)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.data, dtype=torch.float64)

    def __call__(self, *shape: int) -> Any:
        x = self.normal(*shape)
        return self.pack(0.9 + 0.436 * x if self.correlated else x)

    def positive(self, *shape: int) -> Any:
        return self.pack(0.5 + self.normal(*shape).abs() / 2)

    def inside(self, *shape: int) -> Any:
        """Values in (0.05, 0.95) under scale 1."""
        before, self.exponent = self.exponent, 0
        out = self.pack(0.05 + 0.9 * torch.rand(shape, generator=self.data, dtype=torch.float64))
        self.exponent = before
        return out

    def labels(self, classes: int, *shape: int) -> Tensor:
        return torch.randint(classes, shape, generator=self.data)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.data) < 0.3

    def zero_d(self, x: float) -> Tensor:
        """A plain 0-d tensor."""
        return torch.tensor(x, dtype=self.dtype if self.pairs else self.plain_dtype)

    def like(self, x: Any) -> Any:
        return self(*(x.data if isinstance(x, Pair) else x).shape)


def _rms_norm_backward(grad: Any, x: Any, shape: Any, rstd: Any, weight: Any, mask: Any) -> list[Any]:
    """No kernel on a CPU: by autograd."""
    x = x.clone().requires_grad_()
    w = torch.ones(shape, dtype=x.dtype) if weight is None else weight.clone()
    eps = rstd.double() ** -2 - x.detach().square().mean(-1, keepdim=True)
    w.requires_grad_()
    (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w).backward(grad)
    return [x.grad, w.grad if mask[1] else None]


def _cudnn_batch_norm(*args: Any) -> list[Any]:
    return [*aten.native_batch_norm(*args), torch.zeros(0)]


def _cudnn_batch_norm_backward(x: Any, grad: Any, weight: Any, mean: Any, var: Any, m: Any, r: Any, eps: float, _: Any) -> Any:
    return aten.native_batch_norm_backward(grad, x, weight, mean, var, m, r, True, eps, [True] * 3)


# What has no kernel on a CPU, by other means.
WITHOUT_KERNEL = {
    "_fused_rms_norm_backward": _rms_norm_backward, "cudnn_batch_norm": _cudnn_batch_norm,
    "cudnn_batch_norm_backward": _cudnn_batch_norm_backward,
}  # fmt: skip


@dataclass
class Caller:
    """Calls operators, or their rules; remembers which."""

    pairs: bool
    called: list[Any]

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        op = op_named(name)
        self.called.append(op)
        if not self.pairs:
            op = WITHOUT_KERNEL.get(name, op)
            return op(*args, **kwargs)
        row = registry.TABLE.get(op)
        assert row is not None, f"no rule for {name}"
        return row.function(*args, **kwargs)


@dataclass(frozen=True)
class Case:
    """One way to call an operator.

    Attributes:
        name: the operator, and after a colon what is special.
        run: see above.
        span: exponents of the scales that its mathematics permits.
        band: where data RMS must lie for Gaussian data; None where the result is no floating point data of its own.
        wide: the same for data with a mean of 0.9.
        outputs: whose band is checked; all by default.
        half: whether to run it with fp16 data.
        tolerance: relative to the largest element, in float64.
        exponents: of the scales at which bands are checked.
        late: whether a 0-d tensor is split at run time, so that scales are tensors even where inputs' are numbers.
    """

    name: str
    run: Callable[[Caller, Inputs], Any]
    span: int
    band: tuple[float, float] | None
    wide: tuple[float, float]
    outputs: tuple[int, ...] | None
    half: bool
    tolerance: float
    exponents: tuple[int, ...]
    late: bool


CASES: dict[str, Case] = {}
BAND, WIDE = (0.25, 4.0), (1 / 64, 64.0)


def chain(
    name: str, run: Callable[[Caller, Inputs], Any], span: int = 40, band: Any = BAND, wide: Any = WIDE,
    outputs: tuple[int, ...] | None = None, half: bool = True, tolerance: float = 1e-10,
    exponents: tuple[int, ...] = (), late: bool = False,
) -> None:  # fmt: skip
    assert name not in CASES, name
    at = exponents or (-span // 2, 0, span // 2)
    CASES[name] = Case(name, run, span, band, wide, outputs, half, tolerance, at, late)


def case(name: str, args: Callable[[Inputs], tuple[Any, ...]], span: int = 40, **more: Any) -> None:
    op = name.partition(":")[0]
    chain(name, lambda c, g: c(op, *args(g)), span, **more)


def square(g: Inputs) -> Any:
    return g(g.n, g.n)


def pair_of_squares(g: Inputs) -> tuple[Any, Any]:
    return square(g), square(g)


def image(g: Inputs, channels: int = 3, dims: int = 2) -> Any:
    return g(2, channels, *[6 if g.n < 16 else 12] * dims)
