"""AdamW and SGD for scaled parameters, their state in fp32, bf16, fp16 or fp8.

`torch.optim.AdamW(foreach=False)` works on scaled parameters too, through the rules, and keeps its state in the
parameters' dtype. These exist for what that cannot do: a dtype of the state's own, gradients rescaled before they reach
fp16 state (Scalify, arXiv 2407.17353, section 3), stochastic rounding, float32 master weights.

Each step works in float32 data. Every `state_period` steps the RMS of weights and state moves into their scales again:
averages stand under the larger of two scales, which never falls by itself while gradients do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from isoscale._base.errors import CheckpointError, ConfigError, did_you_mean
from isoscale.scalify.pair import Pair
from isoscale.scalify.storage import KINDS, Kind, bytes_of, empty, load, random_bits, rounded, store, uniform
from isoscale.scalify.tensor import ScaledTensor
from isoscale.scalify.update import Adam, Sgd, adam, sgd, unit

_MIX = 0x61C88647
_SETTINGS = ("kind", "master", "rescale_grads", "state_period", "stochastic", "seed", "compile")
WEIGHT = {kind.dtype: name for name, kind in KINDS.items()}


class ScaledOptimizer(torch.optim.Optimizer):
    """What both share.

    Args:
        params: scaled parameters, or groups of them.
        defaults: of a group.
        state: `fp32`, `bf16`, `fp16` or `fp8`.
        master: keep float32 weights in the state; the parameters are their rounded copies.
        rescale_grads: move the RMS of each gradient's data into its scale before the step.
        state_period: at every how many-th step the RMS of weights and state moves into their scales.
        stochastic: round state and weights stochastically.
        seed: of the rounding.
        compile: the whole step through `torch.compile`.

    Raises:
        ConfigError: an unknown state, a period below 1, a parameter that is not scaled.
    """

    moments: tuple[str, ...] = ()

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, state: str = "fp32", master: bool = False,
        rescale_grads: bool = True, state_period: int = 16, stochastic: bool = True, seed: int = 0,
        compile: bool = False,
    ) -> None:  # fmt: skip
        if state not in KINDS:
            raise ConfigError("no such state", key="state", value=state, hint=did_you_mean(state, KINDS))
        if state_period < 1:
            raise ConfigError("a period is at least 1", key="state_period", value=state_period)
        self.kind, self.master, self.rescale_grads = KINDS[state], master, rescale_grads
        self.state_period, self.stochastic, self.seed = state_period, stochastic, seed
        self.compile = compile
        self._run: Callable[..., None] = torch.compile(_run, fullgraph=True) if compile else _run
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Also its own settings: torch's forgets them."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _SETTINGS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._run = torch.compile(_run, fullgraph=True) if self.compile else _run

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; parameters must be scaled."""
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        for at, p in enumerate(given):
            p = p[1] if isinstance(p, tuple) else p
            if not isinstance(p, ScaledTensor):
                raise ConfigError(
                    "a parameter is not scaled", key=f"params[{at}]", value=tuple(p.shape),
                    hint="iso.scalify.scalify(model, optimizer) makes both",
                )  # fmt: skip
            if p.scale.dim():
                raise ConfigError("a parameter has block scales", key=f"params[{at}]", value=tuple(p.scale.shape),
                                  hint="one scale each: iso.scalify.as_scaled; torch.optim steps blocks")  # fmt: skip
        super().add_param_group({**param_group, "params": given})

    def _new_state(self, p: ScaledTensor) -> dict[str, Any]:
        state: dict[str, Any] = {"step": torch.zeros(())}
        for name in self.moments:
            state.update(_kept(name, empty(p.shape, self.kind, p.device)))
        if self.master:
            state.update(_kept("master", Pair(p._data.float(), p._scale.clone())))
        return state

    def _rule(self, group: dict[str, Any]) -> Adam | Sgd:
        raise NotImplementedError

    def _wanted(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.moments

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` is called with gradients on, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        serial = 0
        for group in self.param_groups:
            items, steps, due = [], [], False
            for p in group["params"]:
                serial += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(self._new_state(p))
                state["step"] += 1
                count = int(state["step"])
                due = due or count % self.state_period == 0 or count == 1
                moments = [_pair(state, name) for name in self._wanted(group)]
                grad = p.grad if isinstance(p.grad, ScaledTensor) else None
                g = (grad._data, grad._scale) if grad is not None else (p.grad, torch.ones((), device=p.device))
                master = _pair(state, "master") if self.master else (p._data, p._scale)
                steps.append(state["step"])
                items.append(((p._data, p._scale), g, master, moments, (self.seed + serial * _MIX) % 2**31))
            if not items:
                continue
            lr, decay = (torch.as_tensor(group[name], dtype=torch.float32) for name in ("lr", "weight_decay"))
            self._run(items, steps, lr, decay, self._rule(group), self.kind, self.rescale_grads, due, self.stochastic)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps the dtype it was saved in (torch casts state to the parameter's).

        Raises:
            CheckpointError: the state of another optimiser.
        """
        for i, saved in state_dict["state"].items():
            mine = [name for name in self.moments if name in saved] + (["master"] if self.master else [])
            wanted = {f"{name}{end}" for name in mine for end in ("", "_scale")}
            if not wanted <= saved.keys() or (self.moments[0] not in saved and len(saved) > 1):
                raise CheckpointError(
                    "this is the state of another optimiser", key=f"state[{i}]", value=sorted(saved),
                    hint=f"this one keeps {', '.join(self.moments)}, each with its scale; start its state anew",
                )  # fmt: skip
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(ids, order):
            for name, saved in state_dict["state"].get(i, {}).items():
                if isinstance(saved, Tensor):
                    self.state[p][name] = saved.detach().clone().to(p.device if name != "step" else saved.device)

    def bytes_per_parameter(self) -> dict[str, float]:
        """Persistent bytes per parameter, gradients apart: `weights`, `state` (as kept, or as it will be), `all`."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        count = max(1, sum(p.numel() for p in parameters))
        weights = sum(p._data.nbytes + p._scale.nbytes for p in parameters) / count
        state = 0.0
        for group in self.param_groups:
            names = (*self._wanted(group), *(("master",) if self.master else ()))
            for p in group["params"]:
                kept = self.state.get(p) or self._new_state(p)
                state += sum(bytes_of(Pair(*_pair(kept, name))) for name in names)
        return {"weights": weights, "state": state / count, "all": weights + state / count}


def _kept(name: str, pair: Pair) -> dict[str, Any]:
    return {name: pair.data, f"{name}_scale": pair.scale}


def _pair(state: dict[str, Any], name: str) -> tuple[Tensor, Tensor]:
    return state[name], state[f"{name}_scale"]


def _run(
    items: list[Any], steps: list[Tensor], lr: Tensor, decay: Tensor, rule: Adam | Sgd, kind: Kind,
    rescale_grads: bool, due: bool, stochastic: bool,
) -> None:  # fmt: skip
    """The step of a group; writes into weights and state."""
    for (weight, grad, master, moments, seed), step in zip(items, steps):
        w = Pair(master[0].float(), master[1])
        g = Pair(grad[0].float(), grad[1])
        g = unit(g) if rescale_grads else g
        old = [load(Pair(*moment), weight[0].shape) for moment in moments]
        new: list[Pair | None]
        if isinstance(rule, Adam):
            w, *new = adam(w, g, old[0], old[1], step, lr, decay, rule)
        else:
            w, *new = sgd(w, g, old[0] if old else None, step == 1, lr, decay, rule)
        if due:
            w, new = unit(w), [None if pair is None else unit(pair) for pair in new]
        draws: list[Tensor | None] = [None, None, None]  # for the weight, the last moment, the first of two
        if stochastic:
            start = step.to(torch.int32) * 668265263 + seed
            bits = random_bits(weight[0].shape, start, weight[0].device)
            draws[:2] = [uniform(bits, 0), uniform(bits, 1)]
            if kind.block and len(moments) == 2:
                draws[2] = uniform(random_bits(weight[0].shape, start + 374761393, weight[0].device), 0)
        for at, (moment, pair) in enumerate(zip(reversed(moments), reversed(new))):
            if pair is not None:
                kept = store(pair, kind, draws[at + 1])
                moment[0].copy_(kept.data)
                moment[1].copy_(kept.scale)
        if master[0] is not weight[0]:
            master[0].copy_(w.data)
            master[1].copy_(w.scale)
            draws[0] = None
        low = KINDS[WEIGHT[weight[0].dtype]]
        weight[0].copy_(rounded(w.data, low, draws[0]))
        weight[1].copy_(w.scale)


class ScaledAdamW(ScaledOptimizer):
    """AdamW on scaled parameters; Adam with `decoupled=False`.

    Args:
        params: scaled parameters or groups of them.
        lr: learning rate; a number or a 0-d tensor.
        betas: of the two averages.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in `torch.optim.AdamW`.
        decoupled: False: decay joins the gradient, as in `torch.optim.Adam`.
        maximize: climb instead.
        options: see `ScaledOptimizer`.

    State per parameter: `exp_avg`, `exp_avg_root` (the root of the second moment), each with its scale, and `step`.
    """

    moments = ("exp_avg", "exp_avg_root")

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, *, decoupled: bool = True, maximize: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled,
                    "maximize": maximize}  # fmt: skip
        super().__init__(params, defaults, **options)

    def _rule(self, group: dict[str, Any]) -> Adam:
        return Adam(tuple(group["betas"]), group["eps"], group["decoupled"], group["maximize"])


class ScaledSGD(ScaledOptimizer):
    """SGD with momentum on scaled parameters; arguments as in `torch.optim.SGD`, options as in `ScaledOptimizer`.

    State per parameter: `momentum_buffer` with its scale, and `step`.
    """

    moments = ("momentum_buffer",)

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
        weight_decay: float = 0.0, nesterov: bool = False, *, maximize: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
                    "nesterov": nesterov, "maximize": maximize}  # fmt: skip
        super().__init__(params, defaults, **options)

    def _wanted(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.moments if group["momentum"] else ()

    def _rule(self, group: dict[str, Any]) -> Sgd:
        return Sgd(group["momentum"], group["dampening"], group["nesterov"], group["maximize"])
