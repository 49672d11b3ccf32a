"""Training on one screen: config in, run folder out.

A run folder holds `run.json` (the resolved config), `plan.json`, `metrics.jsonl` (deterministic rows), `timing.jsonl`
(wall times, kept apart so that metric rows are the same bits on every machine), `checkpoints/` and, at the end,
`result.json`. Batches, dropout and init are functions of (seed, name, step), so a resumed run equals an uncut one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isoscale import numerics
from isoscale._base.errors import CheckpointError, ConfigError, NonFiniteError
from isoscale._base.files import atomic_write
from isoscale._base.log import JsonLog, dumps, read
from isoscale._base.rng import stream
from isoscale.config import RunConfig
from isoscale.formats.recipes import BF16
from isoscale.kernels import cpu_step
from isoscale.models import Decoder
from isoscale.optim import LMD, lr_factor, make_optimizer
from isoscale.planning import Plan
from isoscale.probe import first_bad
from isoscale.rules import by_name
from isoscale.train import checkpoint
from isoscale.train.bench import Bench, Ready
from isoscale.train.data import Corpus, TokenStream, eval_batches
from isoscale.train.folder import check, claim, locked, rewind
from isoscale.train.setup import resolved
from isoscale.train.state import Progress, load_optimizer, optimizer_tensors
from isoscale.train.tokenizer import save_tokenizer


@dataclass(frozen=True)
class Tick:
    """What a progress display gets after each step."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Args:
        out: the run folder.
        val_loss: nats per token on the validation split after the last step.
        train_loss: mean over the last tenth of the steps.
        steps, tokens: done.
        skipped, clipped: steps left out, steps whose gradient was cut.
        seconds: wall time, all sessions together.
        backend: which backend ran the low-precision matmuls.
        parameters: count.
    """

    out: Path
    val_loss: float
    train_loss: float
    steps: int
    tokens: int
    skipped: int
    clipped: int
    seconds: float
    backend: str
    parameters: int


def pick_device(name: str) -> torch.device:
    """The device; `auto` is CUDA where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    choices = ["auto", "cpu", *(["cuda", *here] if here else [])]
    if name not in choices:
        raise ConfigError("no such device here", key="train.device", value=name, hint=f"one of {', '.join(choices)}")
    return torch.device(name)


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    """What the forward runs under: bf16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if config.train.precision == "bf16" else nullcontext()


def _check_compiler(config: RunConfig, device: torch.device) -> None:
    if config.train.compile and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        hint = "install g++ (or set CXX), or train.compile=false"
        raise ConfigError("torch.compile needs a C++ compiler on a CPU", key="train.compile", value=True, hint=hint)
    if config.train.fused and (device.type != "cpu" or not cpu_step.available()):
        why = cpu_step.why_not() if device.type == "cpu" else f"the run is on {device}"
        raise ConfigError(f"no fused kernels: {why}", key="train.fused", value=True, hint="train.fused=false")


def evaluate(
    model: Decoder,
    run: Callable[..., Tensor],
    batches: list[tuple[Tensor, Tensor]],
    context: AbstractContextManager[Any],
) -> float:
    """Mean loss of `run`, which is the model or its compiled form, over fixed batches; nats per token."""
    model.eval()
    with torch.no_grad(), context:
        total = sum(float(run(ids, targets)) for ids, targets in batches)
    model.train()
    return total / len(batches)


def train(
    config: RunConfig, out: Path | str, *, resume: bool = False, on_step: Callable[[Tick], None] | None = None,
    bench: Bench | None = None,
) -> RunResult:  # fmt: skip
    """Train one model.

    Args:
        config: the whole run.
        out: run folder; made if missing.
        resume: continue what is there (bit-equal), or start if nothing is. Without it a used folder is refused.
        on_step: called after every step.
        bench: what this process's runs share (texts, the model of a shape, its compiled step); the result is the same.

    Raises:
        IsoscaleError: bad data, a folder of another run, a full disk, a non-finite loss: each says what to do.
    """
    out, config = Path(out), resolved(config)
    check(out, config, resume=resume)
    run = _make(config, out, Bench() if bench is None else bench)
    with locked(out):  # everything that can be refused has been: the folder gets its first file here
        claim(out, config, resume=resume)
        try:
            run.restore()
            atomic_write(out / "plan.json", run.plan.to_json())
            save_tokenizer(run.tokenizer, out / "tokenizer.json")
            return run.go(on_step)
        finally:
            run.close()


def _make(config: RunConfig, out: Path, bench: Bench) -> _Run:
    """The run of a resolved config, before its first step; writes nothing."""
    torch.set_num_threads(config.train.threads)
    device = pick_device(config.train.device)
    _check_compiler(config, device)
    corpus = bench.corpus(config)
    ready = bench.ready(config, corpus.vocab, device)
    optimizer = make_optimizer(ready.plan, ready.model, config.optim, config.seed)
    return _Run(config, out, ready, optimizer, corpus, device)


def stepper(config: RunConfig, out: Path) -> Callable[[int], None]:
    """A function that does what a run does in a step, at LR 0, for measuring; writes nothing."""
    run = _make(resolved(config), out, Bench())
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0

    def step(number: int) -> None:
        run.sampled_gradients(number)
        run.optimizer.step()

    return step


class _Run:
    """One run's moving parts; `go` is the loop."""

    def __init__(
        self, config: RunConfig, out: Path, ready: Ready, optimizer: torch.optim.Optimizer, corpus: Corpus,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.config, self.out, self.optimizer = config, out, optimizer
        self.model, self.plan, self.step_model = ready.model, ready.plan, ready.step
        self.device, self.progress, self.tokenizer = device, Progress(), corpus.tokenizer
        self.text = hashlib.sha256(f"{corpus.sha256} {corpus.tokenizer.to_json()}".encode()).hexdigest()
        self.torn = False  # whether weights, counters and rows disagree just now: no moment for a checkpoint
        self.logs: list[JsonLog] = []
        cfg = config.train
        self.stream = TokenStream(corpus.train, config.data.seq_len, cfg.batch, stream(config.seed, "data"))
        self.val = [
            part
            for ids, targets in eval_batches(corpus.val, config.data.seq_len, cfg.batch, cfg.eval_batches)
            for part in self.micro(ids, targets)
        ]
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.parameters = list(self.model.parameters())
        self.unit = self.model.config.scaling == "unit"
        self.loss_scale = config.numerics.loss_scale
        self.recent: list[float] = []
        self.finish_step = ready.recipe.finish_step(cfg.steps) if numerics.summary(self.model).layers else cfg.steps

    def micro(self, ids: Any, targets: Any) -> list[tuple[Tensor, Tensor]]:
        """A batch's micro-batches, on the device."""
        parts = [torch.from_numpy(part).to(self.device).chunk(self.config.train.accumulate) for part in (ids, targets)]
        return list(zip(*parts))

    def sequences(self, step: int) -> tuple[Any, Any]:
        """Inputs and targets of a step; under a batch ramp the stream runs on without a gap."""
        cfg = self.config.train
        return self.stream.span(cfg.sequences_before(step), cfg.batch_at(step))

    def stages(self) -> dict[int, Plan]:
        """First step of each stage of a batch ramp -> the plan there, where the rules say how; all made, and so
        checked, before the first step."""
        cfg, base, run = self.config.train, self.plan.base, by_name(self.plan.parametrisation).run
        if not cfg.ramp or base is None or not base.batch_tokens or not run.lr.sizes:
            return {}
        length = self.config.data.seq_len
        return {step: self.plan.at(batch_tokens=cfg.batch_at(step) * length) for step in (0, *dict(cfg.ramp))}

    def follow(self, plan: Plan) -> None:
        """Set LR peaks, betas, eps and decay to a stage's."""
        plan.update(self.optimizer, self.model)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]

    def restore(self) -> None:
        """Continue from the newest good checkpoint, if there is one; metric rows after it are dropped."""
        saved = checkpoint.load_latest(self.out)
        if saved is not None:
            self.model.load_state_dict(saved.model)
            load_optimizer(self.model, self.optimizer, saved.optimizer)
            state = dict(saved.state)
            if state.pop("text", self.text) != self.text:
                raise CheckpointError(
                    "the text or the tokenizer is not the one this run was started with", key="data.source",
                    value=str(self.config.data.source), place=str(saved.path),
                    hint="bring the old text back, or start in a new run folder",
                )  # fmt: skip
            self.recent = [float(x) for x in state.pop("recent")]
            self.progress = Progress(**state)
        rewind(self.out, self.progress.step, self.progress.evaluated)
        self.metrics, self.timing = self.logs = [JsonLog(self.out / f"{n}.jsonl") for n in ("metrics", "timing")]

    def close(self) -> None:
        """Close the logs."""
        for log in self.logs:
            log.close()

    def save(self) -> None:
        """A checkpoint of this step; the rows up to it are on the disk first."""
        with open(self.metrics.path, "rb") as rows:
            os.fsync(rows.fileno())
        with self.mean():
            checkpoint.save(
                self.out, self.progress.step, model=self.model.state_dict(),
                optimizer=optimizer_tensors(self.model, self.optimizer),
                state={**self.progress.to_dict(), "recent": self.recent, "text": self.text}, plan=self.plan.to_json(),
                keep=self.config.train.keep,
            )  # fmt: skip

    def mean(self) -> AbstractContextManager[None]:
        """The weights to evaluate and to save: the mean, where the optimiser trains at samples of them."""
        return self.optimizer.mean() if isinstance(self.optimizer, LMD) else nullcontext()

    def context(self) -> AbstractContextManager[Any]:
        """See `autocast`."""
        return autocast(self.config, self.device)

    def gradients(self, step: int) -> float:
        """Gradients of one step into `.grad`; returns the mean loss over the micro-batches."""
        cfg = self.config.train
        torch.manual_seed(stream(self.config.seed, "dropout", step))
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        # The unit-scaled loss hands back the gradient of the sum, so micro-batches add up by themselves.
        weight = self.loss_scale / (1 if self.unit else cfg.accumulate)
        for ids, targets in self.micro(*self.sequences(step)):
            with self.context():
                loss = self.step_model(ids, targets, tokens=cfg.batch_at(step) * self.config.data.seq_len)
            (loss if weight == 1 else loss * weight).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if self.loss_scale != 1:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], self.loss_scale)
        return total / cfg.accumulate

    def sampled_gradients(self, step: int) -> tuple[float, float]:
        """`gradients`, clipped, at each of the optimiser's samples of the weights; the mean loss and norm."""
        count = self.config.optim.samples
        loss = norm = 0.0
        for at in range(count):
            if at and isinstance(self.optimizer, LMD):
                self.optimizer.next_sample()
            loss += self.gradients(step) / count
            limit = self.plan.clip or float("inf")
            norm += float(nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)) / count
        return loss, norm

    def go(self, on_step: Callable[[Tick], None] | None) -> RunResult:
        """Steps until done; a checkpoint also on interruption, unless it hits while a step is half booked."""
        cfg, progress = self.config.train, self.progress
        begun, first, before = time.perf_counter(), progress.step, progress.seconds
        seq_len, before_us = self.config.data.seq_len, cfg.sequences_before(first)
        stages = self.stages()
        if stages:
            self.follow(stages[max(step for step in stages if step <= first)])
        if first > self.finish_step:
            numerics.switch(self.model, BF16)
        val_loss = float("nan")
        self.model.train()
        try:
            if progress.evaluated < progress.step and self.due(cfg.eval_every):  # cut between step and evaluation
                val_loss = self.evaluate()
            while progress.step < cfg.steps:
                step = progress.step
                if step in stages:
                    self.follow(stages[step])
                if step == self.finish_step:
                    self.metrics.append({"kind": "switch", "step": step, "formats": str(BF16)})
                    numerics.switch(self.model, BF16)
                factor = lr_factor(step, cfg.steps, warmup=cfg.warmup, kind=cfg.schedule, final=cfg.final,
                                   decay_share=cfg.decay_share)  # fmt: skip
                for group, peak in zip(self.optimizer.param_groups, self.peaks):
                    group["lr"] = peak * factor
                self.torn = self.config.optim.samples > 1  # between two samples the noise is ahead of the step
                loss, norm = self.sampled_gradients(step)
                self.torn = True
                if abs(loss) < float("inf") and norm < float("inf"):
                    self.optimizer.step()
                    progress.in_a_row = 0
                    progress.clipped += self.plan.clip is not None and norm > self.plan.clip
                else:
                    self.refuse(step, loss, norm)
                progress.step += 1
                progress.seconds = before + time.perf_counter() - begun
                self.metrics.append({"kind": "train", "step": step, "loss": loss, "grad_norm": norm, "lr": factor})
                self.recent = [*self.recent, loss][-max(1, cfg.steps // 10) :]
                self.torn = False
                if self.due(cfg.eval_every):
                    val_loss = self.evaluate()
                if self.due(cfg.checkpoint_every):
                    self.save()
                if on_step is not None:
                    done = cfg.sequences_before(progress.step)
                    rate = (done - before_us) / (time.perf_counter() - begun)
                    on_step(Tick(progress.step, cfg.steps, loss, rate * seq_len,
                                 (cfg.sequences_before(cfg.steps) - done) / rate))  # fmt: skip
        except KeyboardInterrupt:
            if not self.torn:
                self.save()
            raise
        if progress.step == first:  # resumed at the very end
            val_loss = [row["val_loss"] for row in read(self.metrics.path) if row["kind"] == "eval"][-1]
        return self.finish(val_loss)

    def due(self, every: int) -> bool:
        """Whether something done every so many steps, and after the last one, is to be done now."""
        return self.progress.step % every == 0 or self.progress.step == self.config.train.steps

    def evaluate(self) -> float:
        """Validation loss and, where asked, the casts' clipped and flushed shares, as metric rows."""
        with self.mean():
            loss = evaluate(self.model, self.step_model, self.val, self.context())
        self.metrics.append({"kind": "eval", "step": self.progress.step, "val_loss": loss})
        self.timing.append({"step": self.progress.step, "seconds": self.progress.seconds})
        if self.config.numerics.log_casts:
            torch.manual_seed(stream(self.config.seed, "casts", self.progress.step))
            for row in numerics.cast_stats(self.model, lambda: self.once(*self.val[0])):
                self.metrics.append({"kind": "cast", "step": self.progress.step, **row})
        self.progress.evaluated = self.progress.step
        return loss

    def once(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The loss of one batch as training scales it, uncompiled, so that hooks see every module."""
        with self.context():
            loss: Tensor = self.model(ids, targets)
        return loss * self.loss_scale if self.loss_scale != 1 else loss

    def refuse(self, step: int, loss: float, norm: float) -> None:
        """A non-finite step: stop with the first bad tensor named, or leave the update out and count."""
        cfg = self.config.train
        self.progress.skipped += 1
        self.progress.in_a_row += 1
        if cfg.on_non_finite == "skip" and isinstance(self.optimizer, LMD):
            self.optimizer.discard()
        if cfg.on_non_finite == "skip" and self.progress.in_a_row <= cfg.max_skips:
            return
        batch = self.micro(*self.sequences(step))
        torch.manual_seed(stream(self.config.seed, "dropout", step))
        culprit = first_bad(self.model, lambda: torch.stack([self.once(*part) for part in batch]).sum())
        many = f" ({self.progress.in_a_row} steps in a row)" if cfg.on_non_finite == "skip" else ""
        raise NonFiniteError(
            f"step {step}: loss {loss}, gradient norm {norm}{many}", key=culprit, place=str(self.out),
            hint="a lower hps.lr, or train.on_non_finite=skip; the last checkpoint is untouched",
        )  # fmt: skip

    def finish(self, val_loss: float) -> RunResult:
        """Write and return the result."""
        progress = self.progress
        result = RunResult(
            out=self.out, val_loss=val_loss, train_loss=sum(self.recent) / max(1, len(self.recent)),
            steps=progress.step, tokens=self.config.train.sequences_before(progress.step) * self.config.data.seq_len,
            skipped=progress.skipped, clipped=progress.clipped, seconds=progress.seconds,
            backend=numerics.summary(self.model).backend,
            parameters=sum(p.numel() for p in self.parameters),
        )  # fmt: skip
        atomic_write(self.out / "result.json", dumps({**asdict(result), "out": str(self.out)}, indent=1))
        return result
