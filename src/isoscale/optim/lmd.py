"""LMD: log-normal multiplicative dynamics (Nishida et al., arXiv 2506.17768), as an ordinary torch optimiser.

Read in the original were the abstract and the introduction, and the reviews that name the algorithm's parts; its
listing and its tables of settings were not. So each line that had to be reconstructed is a setting here:

| line | setting | evidence |
|---|---|---|
| w = m+ e+ - m- e-, log-normal noise of fixed sigma | `form="split"` | reported |
| gradient times the sampled positive part | `gradient="sample"` | follows from its parent (Kiral et al. 2023) |
| sign of a temporary momentum, regulariser outside of it | `direction="sign"` | reported |
| two betas as in Lion | `betas=(b1, b2)`; one: `(b1,)` | assumed |
| pull of log m to the scale of the prior | `regulariser="log-normal"` | assumed; three more, of other priors |
| medians from max(+-w, 0) plus an offset | `split="max"`, `offset` | assumed; `"product"` keeps m+ m- = b^2 |
| inference by the mean | `mean()` | assumed |
| one Monte-Carlo sample | `samples=1` | reported as a setting |

`form="hypentropy"` is not LMD: one vector theta with w = 2 b sinh theta, LMD's two medians with their product held. Its
posterior has the same mean and variance and another shape; none of the paper's results are claimed for it.

Between steps the parameters hold a sample: a step updates and draws the next one in one pass. Evaluate, and save
weights, inside `with optimizer.mean():`. What is lost: weights written by hand are forgotten at the next step (clear
the state to have it made anew); a Monte-Carlo sum that is under way is not in the state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.kernels.lmd import Draw, gradients, read_log
from isoscale.kernels.normals import indices
from isoscale.optim.lmd_adamw import DEFAULTS as AUX
from isoscale.optim.lmd_adamw import adamw_state, adamw_step
from isoscale.optim.lmd_backend import KERNELS, finite, sample, step
from isoscale.optim.lmd_state import (
    check_group,
    check_lr,
    check_weights,
    current_draw,
    fresh_draw,
    local,
    mean_draw,
    momentum_of,
    names,
    new_state,
    numbers_of,
    place_of,
    spec_of,
)

_OWN = ("aux", "samples", "route", "kernel", "_skipped")
Route = Callable[[str, Tensor], bool]


class LMD(torch.optim.Optimizer):
    """Log-normal multiplicative dynamics for matrices, AdamW for the rest, in one object.

    Args:
        params: parameters, named parameters, or groups. A group says who trains it, `optimizer="lmd"` or `"adamw"`; one
            that does not is routed. `iso.optim.split_parameters(model)` and `plan.param_groups(model)` make them.
        lr: alpha, log units per step: every weight's medians move by this factor at each step, so anneal it.
        sigma: of the log-normal noise, in (0, 1].
        betas: of the momentum: (b1, b2) as in Lion, or one.
        decay: lambda, of the regulariser R: log m stays within 1 / lambda of the prior's, and gets there in
            1 / (lr lambda) steps.
        regulariser: the prior of a median: `log-normal` (R = ln(m / b)), `constant` (R = 1), `half-normal`,
            `exponential`; all centred at b.
        form: `split`, LMD's two medians, or `hypentropy`, one vector; see the module.
        state: `fp32`; `bf16` (momenta in bfloat16, log-medians in 16-bit fixed point); `int8-log` (both in 8 bits).
        aux: settings of the AdamW groups: lr, betas, eps, weight_decay, foreach, fused.
        momentum: `state`, or the momenta's storage: `fp32`, `bf16`, `log8`.
        offset: b / rms of the initial weights. Too large and noise is set by what the medians share; too small and
            signs hardly flip.
        split: `max` or `product`: how medians are made of weights.
        direction: `sign`, or `raw`: the parent rule's.
        gradient: times the positive part of the `sample`, or of the `median`; `auto`: the paper's `sample` for `split`,
            the cheaper `median` for `hypentropy`, which is not the paper's.
        seed: of the noise, the same on every process.
        samples: how often `step(closure)` calls the closure, each time at another sample.
        route: (name, parameter) -> whether LMD trains it; by default tensors of two dimensions and more.
        kernel: `auto`, the fused kernel where there is one, or `reference`.

    Raises:
        ConfigError: settings that cannot be meant, complex parameters, a matrix of zeros.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 0.02, sigma: float = 0.05, betas: Any = (0.9, 0.99), decay: float = 0.1,
        regulariser: str = "log-normal", form: str = "split", state: str = "fp32",
        aux: Mapping[str, Any] | None = None, *, momentum: str = "state", offset: float = 0.1, split: str = "max",
        direction: str = "sign", gradient: str = "auto", seed: int = 0, samples: int = 1, route: Route | None = None,
        kernel: str = "auto",
    ) -> None:  # fmt: skip
        if kernel not in KERNELS:
            raise ConfigError("unknown kernel", key="kernel", value=kernel, hint=did_you_mean(kernel, KERNELS))
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ConfigError("samples is a whole number from 1 on", key="samples", value=samples, hint="1")
        for key in aux or {}:
            if key not in AUX:
                raise ConfigError("no such setting of AdamW here", key=f"aux.{key}", hint=did_you_mean(key, AUX))
        self.aux, self.samples, self.route, self.kernel = {**AUX, **(aux or {})}, samples, route, kernel
        self._skipped = torch.tensor(0)
        self._shown = ""
        self._fresh = 0
        self._sums: dict[Tensor, list[Tensor]] = {}
        self._summed = 0
        defaults = {
            "lr": lr, "sigma": sigma, "betas": betas, "decay": decay, "regulariser": regulariser, "form": form,
            "state": state, "momentum": momentum, "offset": offset, "split": split, "direction": direction,
            "gradient": gradient, "seed": seed,
        }  # fmt: skip
        check_group(defaults)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Also its own settings: torch's forgets them."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._shown, self._fresh, self._summed = "", 0, 0
        self._sums = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group that does not say who trains it is cut in two, and its settings are LMD's.

        Raises:
            ConfigError: an unknown `optimizer`, complex parameters, a matrix of zeros, settings that cannot be meant.
        """
        given = param_group["params"]
        _check_keys(param_group, self.defaults)
        members = [given] if isinstance(given, Tensor) else list(given)
        kind = param_group.get("optimizer")
        if kind not in (None, "lmd", "adamw"):
            raise ConfigError("a group is trained by lmd or by adamw", key="optimizer", value=kind,
                              hint=did_you_mean(str(kind), ("lmd", "adamw")))  # fmt: skip
        for which in ("lmd", "adamw"):
            mine = [x for x in members if (kind or self._routed(x)) == which]
            if not (mine or kind == which or (which == "lmd" and not members)):
                continue
            # what a group that is cut says is said of LMD; the rest goes by `aux`
            cut = kind is None and which == "adamw"
            said = {key: value for key, value in param_group.items() if not (cut and key in self.defaults)}
            self._add({**said, "params": mine, "optimizer": which})

    def _routed(self, member: Any) -> str:
        name, p = member if isinstance(member, tuple) else ("", member)
        if not isinstance(p, Tensor):
            raise ConfigError("LMD takes parameters, named parameters or groups of them", key="params", value=type(p),
                              hint="iso.optim.split_parameters(model), or plan.param_groups(model)")  # fmt: skip
        return "lmd" if (self.route(name, p) if self.route else p.dim() >= 2) else "adamw"

    def _add(self, group: dict[str, Any]) -> None:
        lmd = group["optimizer"] == "lmd"
        foreign = [key for key in ("decay", "sigma") if key in group and not lmd]
        if foreign:
            raise ConfigError(f"AdamW has no {foreign[0]}", key=foreign[0], hint="weight_decay")
        keep = self.defaults
        # torch fills a group from `defaults`, and an AdamW group has others
        self.defaults = keep if lmd else self.aux
        try:
            super().add_param_group(group)
        finally:
            self.defaults = keep
        added = self.param_groups[-1]
        if lmd:
            check_group(added)
            for at, p in enumerate(added["params"]):
                check_weights(self._name(added, at), p)

    def _name(self, group: Mapping[str, Any], at: int) -> str:
        said = group.get("param_names")
        return str(said[at]) if said else f"parameter {at} of {tuple(group['params'][at].shape)}"

    def _each(self) -> Iterator[tuple[int, dict[str, Any], int, Tensor]]:
        """Number, group, place in the group and parameter of what LMD trains."""
        number = 0
        for group in self.param_groups:
            for at, p in enumerate(group["params"]):
                if group["optimizer"] == "lmd":
                    yield number, group, at, p
                number += 1

    def _training(self, what: str) -> None:
        if self._shown:
            raise ConfigError(f"{what} inside {self._shown}(): the parameters are not the sample of this step",
                              key=self._shown, hint=f"leave the context before {what}")  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update, and the next sample into the parameters.

        Args:
            closure: evaluates the loss and its gradients; called `samples` times, at as many samples.

        Returns:
            The closure's loss, averaged; None without one.

        Raises:
            ConfigError: inside `mean()` or `sampled()`; sparse gradients; an LR above 1; a matrix of zeros.
        """
        self._training("step()")
        loss = self._evaluate(closure) if closure is not None else None
        for group in self.param_groups:
            if group["optimizer"] == "lmd" and not torch.compiler.is_compiling():
                check_lr(group["lr"])
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        for g in gradients:
            if g.layout != torch.strided:
                raise ConfigError("LMD takes dense gradients", key="grad", value=str(g.layout),
                                  hint="nn.Embedding(sparse=False)")  # fmt: skip
        ok = finite(gradients) if gradients else True
        if isinstance(ok, Tensor):
            self._skipped += ~ok
        if ok is False:
            self._skipped += 1
        else:
            if not torch.compiler.is_compiling():
                self._prepare(_has_gradient)
            elif any(not self.state.get(p) for group in self.param_groups for p in group["params"] if _has_gradient(p)):
                self._prepare_eagerly()
            for number, group, _, p in self._each():
                if p.grad is not None and self.state.get(p):
                    self._move(number, group, p, ok if isinstance(ok, Tensor) else None)
            self._aux_step(ok if isinstance(ok, Tensor) else None)
        self.discard()
        return loss

    def discard(self) -> None:
        """Forgets what earlier Monte-Carlo samples of this step gave (`next_sample`): for a step that is left out."""
        self._sums, self._summed = {}, 0

    @property
    def skipped(self) -> int:
        """Steps left out for a gradient that was not finite."""
        return int(self._skipped)

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        total = None
        for at in range(self.samples):
            with torch.enable_grad():
                loss = closure()
            total = loss if total is None else total + loss
            if at + 1 < self.samples:
                self.next_sample()
        return total if self.samples == 1 or total is None else total / self.samples

    def _prepare(self, wanted: Callable[[Tensor], bool]) -> None:
        """State for what has none yet; left out while a gradient is all zero and an 8-bit momentum wants its range."""
        for number, group, at, p in self._each():
            if wanted(p) and p.numel() and not self.state.get(p):
                made = new_state(p, group, self._name(group, at), number)
                if made is not None:
                    self.state[p].update(made)
        for group in self.param_groups:
            for p in group["params"]:
                if group["optimizer"] == "adamw" and p.grad is not None and not self.state.get(p):
                    self.state[p].update(adamw_state(p, group))

    @_disable_dynamo  # torch.compiler.disable imports the compiler at once
    def _prepare_eagerly(self) -> None:
        self._prepare(_has_gradient)

    def _move(self, number: int, group: dict[str, Any], p: Tensor, ok: Tensor | None) -> None:
        """Update and next sample of one parameter; where `ok` is false it stays as it is."""
        state, spec = self.state[p], spec_of(group)
        numbers = numbers_of(group, state, number, place_of(p), spec.rounds, captured=ok is not None, ok=ok)
        medians = tuple([local(state[key]) for key in names(spec)])
        momenta = tuple([local(state[momentum_of(key)]) for key in names(spec)])
        given: tuple[Tensor, ...] = (_gradient(p) if ok is None else torch.where(ok, _gradient(p), 0),)
        if p in self._sums:
            logs = tuple(read_log(a) for a in medians)
            index = indices(given[0].shape, numbers.place, given[0].device)
            last = gradients(spec, logs, numbers.centre, numbers.now, index, given[0])
            given = tuple((u + v) / (self._summed + 1) for u, v in zip(self._sums[p], last))
            spec = spec._replace(given=True)
        step(self.kernel, spec, numbers, medians, momenta, given, local(p))
        state["draws"] += 1 if ok is None else ok
        state["noise"].copy_(numbers.next.sigma) if ok is not None else state["noise"].fill_(group["sigma"])

    def _aux_step(self, ok: Tensor | None) -> None:
        for group in self.param_groups:
            if group["optimizer"] == "adamw" and any(p.grad is not None for p in group["params"]):
                gradients = [p.grad for p in group["params"]]
                if self._summed:
                    gradients = [g if g is None else (self._sums[p][0] + g) / (self._summed + 1) if p in self._sums
                                 else g for p, g in zip(group["params"], gradients)]  # fmt: skip
                adamw_step(group, self.state, gradients, ok)

    @torch.no_grad()
    def next_sample(self) -> None:
        """Another Monte-Carlo sample before the step: takes the gradients in, clears them, draws anew.

        Raises:
            ConfigError: inside `mean()` or `sampled()`.
        """
        self._training("next_sample()")
        self._prepare(_has_gradient)
        for number, group, _, p in self._each():
            state = self.state.get(p)
            if p.grad is None or not state:
                continue
            spec, piece = spec_of(group), local(p)
            numbers = numbers_of(group, state, number, place_of(p), spec.rounds)
            medians = tuple(local(state[key]) for key in names(spec))
            index = indices(piece.shape, numbers.place, piece.device)
            logs = tuple(read_log(a) for a in medians)
            self._gather(p, gradients(spec, logs, numbers.centre, numbers.now, index, _gradient(p)))
            sample(self.kernel, spec, numbers, medians, piece)
            state["draws"] += 1
            state["noise"].fill_(group["sigma"])
        for group in self.param_groups:
            for p in group["params"]:
                if group["optimizer"] == "adamw" and p.grad is not None:
                    self._gather(p, (p.grad.clone(),))
                p.grad = None
        self._summed += 1

    def _gather(self, p: Tensor, parts: tuple[Tensor, ...]) -> None:
        sums = self._sums.get(p)
        if sums is None:
            self._sums[p] = list(parts)
        else:
            for total, part in zip(sums, parts):
                total += part

    @contextmanager
    def mean(self) -> Iterator[None]:
        """The mean weights in the parameters: for evaluation, checkpoints and export.

        Restores the sample that was there, also after an exception. Gradients taken inside are of the mean.

        Raises:
            ConfigError: inside another such context.
        """
        with self._showing("mean", lambda group, number, state: mean_draw(group)):
            yield

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """A fresh sample of the weights in the parameters, another one each time: average predictions over several.

        Restores the sample that was there, also after an exception.

        Raises:
            ConfigError: inside another such context; a matrix of zeros.
        """
        self._training("sampled()")
        self._prepare(lambda p: p.requires_grad)
        which, self._fresh = self._fresh, self._fresh + 1

        def draw(group: Mapping[str, Any], number: int, state: Mapping[str, Tensor]) -> Draw:
            return fresh_draw(group, number, int(state["draws"]), which)

        with self._showing("sampled", draw):
            yield

    @contextmanager
    def _showing(self, what: str, draw: Callable[..., Draw]) -> Iterator[None]:
        self._training(f"{what}()")
        self._shown = what
        try:
            self._write(draw)
            yield
        finally:
            self._shown = ""
            self.redraw()

    @torch.no_grad()
    def _write(self, draw: Callable[..., Draw]) -> None:
        for number, group, _, p in self._each():
            state = self.state.get(p)
            if state:
                spec = spec_of(group)
                numbers = numbers_of(group, state, number, place_of(p), spec.rounds)
                medians = tuple(local(state[key]) for key in names(spec))
                sample(self.kernel, spec, numbers._replace(next=draw(group, number, state)), medians, local(p))

    def redraw(self) -> None:
        """Writes into each parameter the sample that its state says it holds; what has no state is left alone."""

        def draw(group: Mapping[str, Any], number: int, state: Mapping[str, Tensor]) -> Draw:
            return current_draw(group, number, int(state["draws"]), float(state["noise"]))

        self._write(draw)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its own dtype, and the parameters get the sample that the state says.

        Raises:
            ConfigError: inside `mean()` or `sampled()`.
        """
        self._training("load_state_dict()")
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        ours = {p for _, _, _, p in self._each()}
        for key, p in zip(ids, parameters):
            if p in ours and key in state_dict["state"]:
                for name, value in state_dict["state"][key].items():
                    self.state[p][name] = value.detach().to(p.device if value.dim() else "cpu", copy=True)
        self.redraw()


def _check_keys(group: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuses keys of a group that would be passed over in silence: another optimiser's, and slips of the pen."""
    kind = group.get("optimizer")
    if kind is None and "eps" in group:
        raise ConfigError("a group with eps is AdamW's, and its lr is no log unit", key="optimizer",
                          hint="iso.plan(..., optimizer='lmd'), or optimizer='adamw' in that group")  # fmt: skip
    if kind != "adamw" and "weight_decay" in group:
        raise ConfigError("LMD's decay is another quantity", key="weight_decay", hint="decay")
    for key in group.keys() - {*known, *AUX, "params", "param_names", "optimizer"}:
        near = get_close_matches(key, known, 1, 0.8)
        if near:
            raise ConfigError("no such setting of a group", key=key, hint=f"did you mean {near[0]!r}?")


def _has_gradient(p: Tensor) -> bool:
    return p.grad is not None


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return local(p.grad)
