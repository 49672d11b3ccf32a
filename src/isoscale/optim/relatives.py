"""Relatives of LMD, for comparison: short and eager, each as its paper has it; only `LieGroup` samples.

`Lion` adds the sign of a momentum; `Madam` multiplies by it; `ExponentiatedGradient` moves two positive vectors by raw
gradients; `LieGroup` is LMD's parent. All keep their own state in the parameters' dtype, as torch's optimisers do.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError


class _Relative(torch.optim.Optimizer):
    """What the four share: closures, and one call per parameter that has a gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)
        return loss

    @abstractmethod
    def _move(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        """One parameter by its gradient."""


def _positive(**values: float) -> None:
    for key, value in values.items():
        if not isinstance(value, int | float | Tensor) or not 0 < float(value) < math.inf:
            raise ConfigError(f"{key} must be positive and finite", key=key, value=value)


class Lion(_Relative):
    """Chen et al., arXiv 2302.06675: the sign of an interpolated momentum, decoupled decay.

    Args:
        params: parameters or groups.
        lr: step of every weight.
        betas: of the signed interpolation, and of the average.
        weight_decay: a step shrinks weights by lr x weight_decay.

    Raises:
        ConfigError: an LR that is not positive.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        _positive(lr=lr)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _move(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * torch.lerp(g, momentum, beta1).sign_())
        momentum.lerp_(g, 1 - beta2)


class Madam(_Relative):
    """Bernstein et al., arXiv 2006.14560: w <- w exp(-lr sign(w) g / rms(g)), signs never change.

    Args:
        params: parameters or groups.
        lr: log units per step at a typical gradient.
        beta: of the average of g^2.
        clip: largest g / rms(g).
        bound: largest |w| over the rms of the initial weights; inf for none.

    Raises:
        ConfigError: an LR, a clip or a bound that is not positive; a parameter that starts at zero and so stays there.
    """

    def __init__(
        self, params: Any, lr: float = 0.01, beta: float = 0.999, clip: float = 10.0, bound: float = 3.0
    ) -> None:
        _positive(lr=lr, clip=clip)
        if not bound > 0:
            raise ConfigError("bound must be positive", key="bound", value=bound, hint="3.0; math.inf for none")
        super().__init__(params, {"lr": lr, "beta": beta, "clip": clip, "bound": bound})

    def _move(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state, beta = self.state[p], group["beta"]
        if not state:
            rms = p.square().mean().sqrt()
            if not float(rms) > 0:
                shape = tuple(p.shape)
                raise ConfigError("Madam cannot move what starts at zero", key="params", value=shape, hint="use AdamW")
            state.update(step=torch.tensor(0.0), square=torch.zeros_like(p), largest=rms * group["bound"])
        state["step"] += 1
        state["square"].lerp_(g * g, 1 - beta)
        rms_g = (state["square"] / (-math.expm1(float(state["step"]) * math.log(beta)))).sqrt_()
        turn = (g / rms_g).nan_to_num_(0.0, 0.0, 0.0).clamp_(-group["clip"], group["clip"])
        p.mul_(torch.exp(-group["lr"] * torch.sign(p) * turn))
        largest = state["largest"]
        p.copy_(torch.minimum(torch.maximum(p, -largest), largest))


class ExponentiatedGradient(_Relative):
    """EGU+- (Kivinen and Warmuth 1997): w = u+ - u-, u+- <- u+- exp(-+ lr g), unnormalised.

    Args:
        params: parameters or groups.
        lr: of raw gradients, so large: 1 to 1000.
        offset: of both vectors at the start, over the weights' rms; vectors that start at zero stay there.

    Raises:
        ConfigError: an LR or an offset that is not positive.
    """

    def __init__(self, params: Any, lr: float = 10.0, offset: float = 0.1) -> None:
        _positive(lr=lr, offset=offset)
        super().__init__(params, {"lr": lr, "offset": offset})

    def _move(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            b = group["offset"] * p.square().mean().sqrt()
            state.update(up=p.clamp(min=0) + b, down=(-p).clamp(min=0) + b)
        turn = (group["lr"] * g).clamp_(-1, 1)
        state["up"].mul_(torch.exp(-turn))
        state["down"].mul_(torch.exp(turn))
        torch.sub(state["up"], state["down"], out=p)


class LieGroup(_Relative):
    """The multiplicative Lie-group rule (Kiral et al., AISTATS 2023), LMD's parent.

    w = g+ e+ - g- e-, with Rayleigh noise e; momenta of +-(dL/dw) g e minus a temperature; g <- g exp(-lr momentum).
    Between steps the parameters hold a sample; `mean()` gives g+ - g-, as its authors evaluate.

    Args:
        params: parameters or groups.
        lr: of raw gradients, so large: 50 to 100 in the source.
        beta: of the momenta.
        temperature: over the number of training examples.
        offset: added to both vectors at the start, absolute.
        seed: of the noise.

    Raises:
        ConfigError: an LR or an offset that is not positive.
    """

    def __init__(
        self, params: Any, lr: float = 50.0, beta: float = 0.9, temperature: float = 1e-6, offset: float = 1e-5,
        seed: int = 0,
    ) -> None:  # fmt: skip
        _positive(lr=lr, offset=offset)
        self._draws = torch.Generator().manual_seed(seed)
        super().__init__(params, {"lr": lr, "beta": beta, "temperature": temperature, "offset": offset})

    def _noise(self, p: Tensor) -> Tensor:
        u = torch.rand(p.shape, generator=self._draws).clamp_(min=1e-7)
        return (-2 * torch.log(u)).sqrt_().to(p.device, p.dtype)

    def _move(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            # from one draw of the init, the other vector from the same values in another order
            other = p.flatten()[torch.randperm(p.numel(), generator=self._draws).to(p.device)].view_as(p)
            for name, part in (("up", p), ("down", other)):
                state[name] = part.abs() + group["offset"]
                state[f"{name}_noise"] = torch.ones_like(p)
                state[f"{name}_momentum"] = torch.zeros_like(p)
        for name, sign in (("up", 1.0), ("down", -1.0)):
            vector, noise, momentum = (state[f"{name}{end}"] for end in ("", "_noise", "_momentum"))
            momentum.lerp_(sign * g * vector * noise - group["temperature"], 1 - group["beta"])
            vector.mul_(torch.exp((-group["lr"] * momentum).clamp_(-1, 1)))
            noise.copy_(self._noise(p))
        p.copy_(state["up"] * state["up_noise"] - state["down"] * state["down_noise"])

    @contextmanager
    def mean(self) -> Iterator[None]:
        """g+ - g- in the parameters; restores the sample on leaving."""
        held = [(p, p.detach().clone()) for group in self.param_groups for p in group["params"] if self.state[p]]
        try:
            for p, _ in held:
                p.data.copy_(self.state[p]["up"] - self.state[p]["down"])
            yield
        finally:
            for p, sample in held:
                p.data.copy_(sample)
