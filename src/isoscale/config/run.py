"""The settings of a run: typed, frozen, checked at birth. One section per noun; every field says what it is.

Unknown keys are errors. Sizes are features, tokens, sequences or steps as each line says; hyperparameters are in base
units (what was tuned on the proxy), never what the optimiser of the target finally gets: that is the plan's work.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from isoscale.config.hps import HpsSection, Modules
from isoscale.config.section import Count, Positive, Section, Share, Size, wrong
from isoscale.config.sweep import SweepSection


class RulesSection(Section):
    """Which parametrisation, and its switches."""

    parametrisation: str = Field("u-mup", description="sp, mup, u-mup, completep, complete-d, u-complete-d, ...")
    decay: Literal["rule", "independent", "coupled"] = Field("rule", description="weight decay against the LR")
    embedding_lr: Literal["rule", "constant"] = Field("rule", description="u-muP: 1/sqrt(fan_out), or constant")
    alpha: Annotated[float, Field(ge=0.5, le=1)] = Field(1.0, description="depth exponent of complete-d and its family")
    duration: Literal["iso-horizon", "tau-constant", "none"] = Field(
        "iso-horizon", description="what moves with the training length: LR, decay, betas and eps; decay alone; nothing"
    )
    duration_exponent: Share = Field(0.5, description="the LR falls as (tokens / base tokens)^-this")
    tau_exponent: Share = Field(0.0, description="the decay's share of the run falls as (tokens/parameter)^-this")
    betas: Literal["linear", "power", "constant"] = Field(
        "linear", description="1 - beta times m_B/m_D, or beta^(m_B/m_D)"
    )
    final_norm_eps: Literal["printed", "derived"] = Field("printed", description="derived: with the width factor")
    axes: tuple[Literal["width", "depth", "batch", "duration"], ...] = Field(
        ("width", "depth", "batch", "duration"), description="axes whose rules are on"
    )
    constant: tuple[Literal["init", "lr", "eps", "weight_decay", "betas", "multipliers"], ...] = Field(
        (), description="quantities whose rules are off"
    )


class OptimSection(Section):
    """Which optimiser, and LMD's own settings."""

    name: Literal["adamw", "sgd", "adafactor", "muon", "muon-rms", "lion", "madam", "lmd"] = Field(
        "adamw", description="muon, madam and lmd train matrices and leave the rest to AdamW at lr x lr_rest"
    )
    form: Literal["split", "hypentropy"] = Field("split", description="lmd: two medians a weight, or one vector")
    state: Literal["fp32", "bf16", "int8-log"] = Field("fp32", description="lmd: how medians and momenta are stored")
    regulariser: Literal["log-normal", "constant", "half-normal", "exponential"] = Field(
        "log-normal", description="lmd: the prior of a median"
    )
    offset: Positive = Field(0.1, description="lmd: what both medians share at the start / rms of the weights")
    samples: Count = Field(1, description="lmd: Monte-Carlo samples of the weights per step")

    @property
    def lmd_bytes(self) -> int:
        """LMD's state of one weight: a log-median and a momentum, once or twice."""
        return {"split": 4, "hypentropy": 2}[self.form] * {"fp32": 4, "bf16": 2, "int8-log": 1}[self.state]

    @model_validator(mode="after")
    def _only_lmd(self) -> OptimSection:
        for key, field in type(self).model_fields.items():
            if self.name != "lmd" and key != "name" and getattr(self, key) != field.default:
                raise wrong(key, f"optim.{key} is LMD's, and the optimiser is {self.name}", "optim.name = \"lmd\"")
        if self.form == "hypentropy" and self.regulariser == "constant":
            raise wrong("regulariser", "a constant shrink needs two medians", "optim.form = \"split\"")
        return self


class ModelSection(Section):
    """The decoder's shape."""

    width: Size = Field(64, description="model width, features")
    depth: Annotated[int, Field(ge=1, le=4096)] = Field(4, description="number of blocks")
    head_size: Size = Field(16, description="features per attention head, even")
    kv_heads: Size | None = Field(None, description="key/value heads (GQA); none: as many as query heads")
    ffn_ratio: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] = Field(
        3.0, description="FFN hidden size / width"
    )
    qk_norm: bool = False
    norm: Literal["plain", "trainable"] = Field("plain", description="plain: RMSNorm without a gain")
    tied: bool = Field(False, description="readout shares the embedding's weight")
    separate: bool = Field(False, description="q, k, v, gate and up as weights of their own (for per-module HPs)")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _heads(self) -> ModelSection:
        if self.head_size % 2:
            near = f"model.head_size = {self.head_size + 1}"
            raise wrong("head_size", f"head_size {self.head_size} is odd; rotary positions need an even one", near)
        if self.width % self.head_size:
            near = f"model.width = {max(self.head_size, round(self.width / self.head_size) * self.head_size)}"
            raise wrong("width", f"width {self.width} is not divisible by head_size {self.head_size}", near)
        heads = self.width // self.head_size
        if self.kv_heads is not None and heads % self.kv_heads:
            near = f"one of {[n for n in range(1, min(heads, 64) + 1) if heads % n == 0]}"
            raise wrong("kv_heads", f"kv_heads {self.kv_heads} does not divide the {heads} query heads", near)
        if round(self.width * self.ffn_ratio) < 1:
            raise wrong("ffn_ratio", f"ffn_ratio {self.ffn_ratio} leaves no hidden feature", "model.ffn_ratio = 3.0")
        return self


class BaseSection(Section):
    """Where the hyperparameters were tuned. Needed where a rule has ratios (muP); u-muP needs none."""

    width: Size | None = None
    depth: Size | None = None
    batch: Count | None = Field(None, description="sequences per step; none: as the target's")
    steps: Count | None = Field(None, description="steps of the base's run; none: the target's tokens")


class DataSection(Section):
    """Text and how it is cut."""

    source: str | tuple[str, ...] = Field("builtin:austen+web", description="builtin:..., files or folders")
    tokenizer: str = Field("bytes", description="bytes, bpe:SIZE, or a tokenizer.json")
    seq_len: Annotated[int, Field(ge=2, le=2**24)] = Field(128, description="tokens per sequence")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="tail of each text kept for validation")
    cache: str | None = Field(None, description="folder of cached tokens")


class TrainSection(Section):
    """The loop."""

    steps: Count = 300
    batch: Count = Field(8, description="sequences per optimiser step, all micro-batches together")
    ramp: tuple[tuple[Count, Count], ...] = Field(
        (), description="batch ramp: (first step, sequences per step), ...; LR and betas follow where the rules say how"
    )
    accumulate: Count = Field(1, description="micro-batches per optimiser step")
    warmup: Share = Field(0.1, description="share of the steps")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    final: Share = Field(0.1, description="LR at the end / peak LR")
    decay_share: Share = Field(0.2, description="wsd: share of the steps spent decaying")
    clip: Positive | None = Field(None, description="largest gradient norm, at the base; none: off")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast, weights stay fp32")
    compile: bool = Field(False, description="torch.compile the step (needs a C++ compiler on a CPU)")
    fused: bool = Field(
        False, description="CPU, fp32: attention, SwiGLU and norms in one pass each (needs a C++ compiler)"
    )
    eval_every: Count = 100
    eval_batches: Count = 16
    checkpoint_every: Count = 100
    keep: Count = Field(2, description="checkpoints kept")
    on_non_finite: Literal["stop", "skip"] = "stop"
    max_skips: Count = Field(10, description="skip: give up after so many in a row")
    threads: Count = 1
    device: str = Field("auto", description="auto, cpu, cuda")

    def batch_at(self, step: int) -> int:
        """Sequences of a step."""
        return ([self.batch] + [size for first, size in self.ramp if first <= step])[-1]

    def sequences_before(self, step: int) -> int:
        """Sequences of all steps before this one."""
        ends = [*(first for first, _ in self.ramp), step]
        sizes, begun = [self.batch, *(size for _, size in self.ramp)], [0, *(first for first, _ in self.ramp)]
        return sum(size * max(0, min(end, step) - first) for size, first, end in zip(sizes, begun, ends))

    @model_validator(mode="after")
    def _ramps(self) -> TrainSection:
        firsts = [first for first, _ in self.ramp]
        if firsts != sorted(set(firsts)) or any(first >= self.steps for first in firsts):
            raise wrong("ramp", f"the ramp's steps {firsts} do not rise, or lie past the last of {self.steps}",
                         "train.ramp = [[100, 16], [200, 32]]")  # fmt: skip
        for _, size in self.ramp:
            if size % self.accumulate:
                raise wrong("ramp", f"batch {size} is not divisible by accumulate {self.accumulate}",
                             f"a multiple of {self.accumulate}")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _divides(self) -> TrainSection:
        if self.batch % self.accumulate:
            near = [n for n in range(1, min(self.batch, 64) + 1) if self.batch % n == 0]
            text = f"batch {self.batch} is not divisible by accumulate {self.accumulate}"
            raise wrong("accumulate", text, f"one of {near}")
        return self


class NumericsSection(Section):
    """Which tensors are cast to what."""

    recipe: str = Field(
        "none", description="none, bf16, fp8, mxfp8, mxfp6, mxfp4, nvfp4, ... (isoscale plan shows what it means)"
    )
    keep_first: Share | None = Field(
        None, description="share of the blocks kept in BF16 at the front; none: the recipe's"
    )
    keep_last: Share | None = Field(None, description="the same at the back")
    finish: Share | None = Field(None, description="share of the steps, at the end, in BF16; none: the recipe's")
    norm: Literal["none", "mxnorm", "mxnorm-fine", "mxnorm-p1", "mxnorm-ride", "mxnorm-rounded"] = Field(
        "none", description="mxnorm: block norms from the block maxima of the cast behind them (block-scaled recipes)"
    )
    backend: Literal["auto", "emulated", "scaled_mm"] = "auto"
    loss_scale: Positive = Field(1.0, description="factor on the loss in the backward pass, undone before the update")
    log_casts: bool = Field(False, description="log the clipped and flushed share of every cast at each evaluation")


class RunConfig(Section):
    """A whole run."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    rules: RulesSection = Field(default_factory=RulesSection)
    hps: HpsSection = Field(default_factory=HpsSection)
    modules: Modules = Field(default_factory=dict, description="factors by module type and depth, see ModuleKey")
    optim: OptimSection = Field(default_factory=OptimSection)
    model: ModelSection = Field(default_factory=ModelSection)
    base: BaseSection = Field(default_factory=BaseSection)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    numerics: NumericsSection = Field(default_factory=NumericsSection)
    sweep: SweepSection = Field(default_factory=SweepSection)

    def with_values(self, **values: object) -> RunConfig:
        """A copy with dotted keys replaced: `config.with_values(**{"model.width": 256})`; validated anew.

        Raises:
            ConfigError: an unknown key or a value that does not fit.
        """
        from isoscale.config.load import build

        tree = self.model_dump(mode="python", exclude_unset=True)
        for key, value in values.items():
            *path, leaf = key.split(".")
            node = tree
            for part in path:
                if not isinstance(node.get(part), dict):
                    node[part] = {}  # no section: `build` says so
                node = node[part]
            node[leaf] = value
        return build(tree)
