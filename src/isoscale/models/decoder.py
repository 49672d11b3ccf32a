"""A Llama-style decoder: RoPE, SwiGLU, RMSNorm, grouped heads. One body for standard, muP and u-muP models.

`scaling="unit"` uses unit-scaled ops, `"plain"` torch's own: the same modules, so that the two differ in scale only.
Every multiplier of a parametrisation is a plain float attribute, listed by `Decoder.sites`; a plan may set it.
Factors of attention, SwiGLU and the residual add are folded into the next GEMM, which is why a unit-scaled step costs
hardly more than a plain one; a probe sees the logical value as `value * factor`, the factor being the folded part.
What is lost: the code below passes `pending` and the residual scales along instead of one op at a time. With dropout
or a probe the residual add runs unfolded, with equal results up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch.nn.functional as torch_f
from torch import Tensor, nn

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.nn import functional as F
from isoscale.nn import fused
from isoscale.nn.attention import causal_scores, raw_attention, sdpa_factor
from isoscale.nn.factors import attention_factor, residual_scales, silu_glu_factor, transformer_residual_rule
from isoscale.nn.linear import Embedding, Linear, LinearReadout, Scaling
from isoscale.nn.losses import loss_rows
from isoscale.nn.modules import RMSNorm
from isoscale.nn.mxnorm_linear import MXNormGain
from isoscale.nn.scale import residual_blend, times

Probe = Callable[[str, str, Tensor, float], None]
"""`probe(path, port, value, factor)`: the logical tensor is `value * factor`, its gradient `value.grad / factor`
(not so for `loss_logits`: if unit-scaled, its factor acts forward only)."""


@dataclass(frozen=True)
class Site:
    """One place in the forward pass.

    `path` is the module, "" for the model; `port` which of its tensors; `kind` what that tensor is, the key of site
    rules; `attr` the float attribute of the module that scales it, if any; `index` the residual branch, 0 elsewhere.
    """

    path: str
    port: str
    kind: str
    attr: str | None
    index: int = 0


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and scaling of a `Decoder`; refuses nonsense at birth.

    `width` is the residual stream, `depth` the number of blocks, `ffn_ratio * width` the hidden size of SwiGLU.
    `norm="plain"` has no gains. `separate` gives q, k, v, gate and up weights of their own (the same function; for
    hyperparameters by module). The alphas are u-muP's (arXiv 2407.17465, Table 2) and only initialise attributes.
    """

    causal: ClassVar[bool] = True
    vocab: int = 256
    width: int = 64
    depth: int = 4
    head_size: int = 16
    kv_heads: int | None = None
    ffn_ratio: float = 3.0
    qk_norm: bool = False
    norm: Literal["plain", "trainable"] = "plain"
    tied: bool = False
    separate: bool = False
    dropout: float = 0.0
    norm_eps: float = 1e-5
    scaling: Scaling = "unit"
    alpha_attn: float = 1.0
    alpha_ffn_act: float = 1.0
    alpha_res: float = 1.0
    alpha_res_attn_ratio: float = 1.0
    alpha_loss: float = 1.0

    def __post_init__(self) -> None:
        for key, least in (("vocab", 2), ("width", 1), ("depth", 1), ("head_size", 1), ("kv_heads", 1)):
            size = getattr(self, key)
            if not (key == "kv_heads" and size is None) and (type(size) is not int or size < least):
                raise ConfigError(f"{key} must be a whole number of at least {least}", key=key, value=size)
        for key in ("ffn_ratio", "norm_eps", "alpha_attn", "alpha_ffn_act", "alpha_loss"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"{key} must be a finite number > 0", key=key, value=getattr(self, key))
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout must be in [0, 1)", key="dropout", value=self.dropout)
        for key, choices in (("norm", ("plain", "trainable")), ("scaling", ("unit", "plain"))):
            value = getattr(self, key)
            if value not in choices:
                raise ConfigError(f"unknown {key}", key=key, value=value, hint=did_you_mean(str(value), choices))
        transformer_residual_rule(self.alpha_res, self.alpha_res_attn_ratio)  # refuses bad values of its own
        if self.head_size % 2:
            raise ConfigError("rotary positions need an even head size", key="head_size", value=self.head_size)
        if self.width % self.head_size:
            near = max(1, round(self.width / self.head_size)) * self.head_size
            hint = f"{near} fits head_size {self.head_size}"
            raise ConfigError("width must be a multiple of head_size", key="width", value=self.width, hint=hint)
        if self.heads % self.groups:
            hint = f"one of {[count for count in range(1, self.heads + 1) if self.heads % count == 0]}"
            raise ConfigError("kv_heads must divide the heads", key="kv_heads", value=self.kv_heads, hint=hint)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.width // self.head_size

    @property
    def groups(self) -> int:
        """Number of key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden(self) -> int:
        """Hidden size of the MLP."""
        return max(1, round(self.ffn_ratio * self.width))


class Pass(NamedTuple):
    """What every block of one forward pass needs."""

    rope: tuple[Tensor, Tensor]
    tokens: int | None
    probe: Probe | None
    fused: bool = False

    def see(self, path: str, port: str, value: Tensor, factor: float = 1.0) -> None:
        """Tells the probe, if there is one."""
        if self.probe is not None:
            self.probe(path, port, value, factor)


def make_norm(config: DecoderConfig, size: int, role: str = "gain") -> RMSNorm:
    """The model's kind of RMSNorm."""
    return RMSNorm(size, config.norm_eps, config.norm == "trainable", role=role, scaling=config.scaling)


class Attention(nn.Module):
    """Self-attention, causal in a decoder, `[batch, length, width]`; `logit_scale` is the full factor on q.k."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        size, scaling = config.head_size, config.scaling
        self.logit_scale = config.alpha_attn / size if scaling == "unit" else size**-0.5
        parts = (config.heads, config.groups, config.groups)
        if config.separate:
            self.q, self.k, self.v = (Linear(config.width, n * size, scaling=scaling) for n in parts)
        else:
            self.qkv = Linear(config.width, sum(parts) * size, scaling=scaling)
        self.out = Linear(config.width, config.width, scaling=scaling)
        if config.qk_norm:
            self.q_norm, self.k_norm = (make_norm(config, size, "finite") for _ in range(2))

    def forward(self, x: Tensor, run: Pass, path: str) -> tuple[Tensor, float]:
        """The attention output before `out`, `[batch, length, width]`, and its pending factor."""
        config, unit, (batch, length, _) = self.config, self.config.scaling == "unit", x.shape
        p = config.dropout if self.training else 0.0
        if run.fused and p == 0 and not (config.separate or config.qk_norm):
            size, scale = config.head_size, self.logit_scale
            done = fused.attend(self.qkv(x, tokens=run.tokens), *run.rope, heads=config.heads, groups=config.groups,
                                scale=scale, causal=config.causal)  # fmt: skip
            return done, attention_factor(scale * size, size, length, config.causal) if unit else 1.0
        parts = []
        for name in ("q", "k", "v") if config.separate else ("qkv",):
            part = getattr(self, name)(x, tokens=run.tokens)
            run.see(f"{path}.{name}", "out", part)
            parts.append(part.view(batch, length, -1, config.head_size).transpose(1, 2))
        q, k, v = parts if config.separate else parts[0].split((config.heads, config.groups, config.groups), 1)
        if config.qk_norm:
            q = self.q_norm(q, tokens=run.tokens and run.tokens * config.heads)
            k = self.k_norm(k, tokens=run.tokens and run.tokens * config.groups)
        cos, sin = run.rope[0].to(q.dtype), run.rope[1].to(q.dtype)
        q, k = F.apply_rope(q, cos, sin), F.apply_rope(k, cos, sin)
        if run.probe is not None:
            run.probe(path, "logits", causal_scores(q, k), self.logit_scale)
        out = raw_attention(q, k, v, scale=self.logit_scale, is_causal=config.causal, dropout_p=p)
        factor = sdpa_factor(q, k, scale=self.logit_scale, is_causal=config.causal, dropout_p=p) if unit else 1.0
        out = out.transpose(1, 2).reshape(batch, length, -1)
        run.see(path, "out", out, factor)
        return out, factor


class MLP(nn.Module):
    """SwiGLU, `[..., width]`; `act_mult` sharpens the gate.

    The two linears mirror each other's factors: forward `width^-1/2` here is the input-gradient factor there.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.scaling, self.act_mult = config.scaling, config.alpha_ffn_act
        width, hidden, scaling = config.width, config.hidden, config.scaling
        self.separate = config.separate
        if config.separate:
            self.gate, self.up = (Linear(width, hidden, constraint=None, scaling=scaling) for _ in range(2))
        else:
            self.gate_up = Linear(width, 2 * hidden, constraint=None, grad_fan_out=hidden, scaling=scaling)
        self.down = Linear(hidden, width, constraint=None, scaling=scaling)

    def forward(self, x: Tensor, run: Pass, path: str) -> tuple[Tensor, float]:
        """The gated activation before `down`, `[..., hidden]`, and its pending factor."""
        parts = []
        for name in ("gate", "up") if self.separate else ("gate_up",):
            parts.append(getattr(self, name)(x, tokens=run.tokens))
            run.see(f"{path}.{name}", "out", parts[-1])
        if run.fused and not self.separate:
            active = fused.glu(parts[0], self.act_mult)
        else:
            gate, up = parts if self.separate else parts[0].chunk(2, -1)
            active = torch_f.silu(times(gate, self.act_mult)) * up
        factor = (silu_glu_factor(self.act_mult) if self.scaling == "unit" else 1.0) / self.act_mult
        run.see(path, "act", active, factor)
        return active, factor


class Block(nn.Module):
    """Pre-norm block. `attn_tau` and `mlp_tau` weigh the branches: unit by the residual rule, plain as multipliers."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.config, self.unit = config, config.scaling == "unit"
        rule = transformer_residual_rule(config.alpha_res, config.alpha_res_attn_ratio)
        taus = [rule(2 * index + step, 2 * config.depth) for step in (0, 1)]
        self.attn_tau, self.mlp_tau = taus if self.unit else (1.0, 1.0)
        self.attn_norm = make_norm(config, config.width)
        self.attn = Attention(config)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, run: Pass, path: str) -> Tensor:
        """`[batch, length, width]` to the same."""
        x = self._branch(x, run, path, "attn", self.attn_tau, self.attn_norm, self.attn, "out")
        return self._branch(x, run, path, "mlp", self.mlp_tau, self.mlp_norm, self.mlp, "down")

    def _branch(
        self, x: Tensor, run: Pass, path: str, name: str, tau: float, norm: RMSNorm | MXNormGain, body: nn.Module,
        last: str,
    ) -> Tensor:  # fmt: skip
        """Norm, body, last linear, residual add; the last two in one GEMM unless the branch is looked at or dropped."""
        a, b = residual_scales(tau) if self.unit else (tau, 1.0)
        if run.fused and type(norm) is RMSNorm and norm.weight is None:
            h, skip = fused.norm_split(x, a if self.unit else 1.0, b, norm.eps)
        else:
            h, skip = norm.split(x, branch_scale=a, skip_scale=b, tokens=run.tokens)
        run.see(f"{path}.{name}_norm", "out", norm.look(h) if isinstance(norm, MXNormGain) and run.probe else h)
        h, pending = body(h, run, f"{path}.{name}")
        linear: Callable[..., Tensor] = getattr(body, last)
        drop = self.config.dropout if self.training else 0.0
        if run.probe is None and drop == 0:
            return linear(h, pending=pending, skip=skip, branch_scale=a, skip_scale=b, tokens=run.tokens)
        branch = linear(h, pending=pending, tokens=run.tokens)
        run.see(f"{path}.{name}.{last}", "out", branch)
        if drop:
            branch = F.dropout(branch, drop) if self.unit else torch_f.dropout(branch, drop)
        out = residual_blend(branch, skip, a, b) if self.unit else skip + times(branch, a)
        run.see(path, f"{name}_residual", out)
        return out


class Decoder(nn.Module):
    """Token ids `[batch, length]` to logits or loss. See `DecoderConfig`.

    With `fused` set, attention, SwiGLU and norms run in one pass each where `isoscale.nn.fused` covers them.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.loss_mult = config.alpha_loss
        self.fused = False
        self.embed = Embedding(config.vocab, config.width, scaling=config.scaling)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = make_norm(config, config.width, "final_norm")
        self.head = LinearReadout(config.width, config.vocab, tied=config.tied, scaling=config.scaling)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, e.g. after `to_empty`."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None and module is not self:
                reset()

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, *, tokens: int | None = None, probe: Probe | None = None
    ) -> Tensor:
        """Run the model.

        Args:
            ids: `[batch, length]` integers.
            targets: `[batch, length]`; -100 marks positions that do not count.
            tokens: global token count of the step (all ranks and accumulation steps), for unit-scaled weight
                gradients; None counts `ids`.
            probe: sees the tensor at every site.

        Returns:
            Logits `[batch, length, vocab]`, or with targets the loss in mean nats per counted token.
        """
        x = self.embed(ids, tokens=tokens)
        config = self.config
        quick = self.fused and probe is None and fused.covers(x, config.width, config.head_size, config.hidden)
        run = Pass(F.rope_tables(ids.shape[1], config.head_size, ids.device), tokens, probe, quick)
        run.see("embed", "out", x)
        for index, block in enumerate(self.blocks):
            x = block(x, run, f"blocks.{index}")
        if quick and type(self.norm) is RMSNorm and self.norm.weight is None:
            x = fused.norm_split(x, 1.0, 0.0, self.norm.eps)[0]
        else:
            x = self.norm(x, tokens=tokens)
        run.see("norm", "out", x)
        logits: Tensor = self.head(x, tokens=tokens, weight=self.embed.weight if self.config.tied else None)
        run.see("head", "out", logits)
        if targets is None:
            return logits
        run.see("", "loss_logits", logits, self.loss_mult)
        if self.config.scaling == "unit":
            return F.cross_entropy(logits, targets, mult=self.loss_mult)
        return torch_f.cross_entropy(*loss_rows(times(logits, self.loss_mult), targets))

    @property
    def parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the projections into attention and MLP."""
        return (("q", "k", "v"), ("gate", "up")) if self.config.separate else (("qkv",), ("gate_up",))

    def sites(self) -> tuple[Site, ...]:
        """Every port that a probe sees, in forward order."""
        found = [Site("embed", "out", "embedding", "multiplier")]
        for i in range(self.config.depth):
            at, attn, mlp = f"blocks.{i}", f"blocks.{i}.attn", f"blocks.{i}.mlp"
            found += [
                Site(f"{attn}_norm", "out", "norm", None),
                *(Site(f"{attn}.{part}", "out", "hidden", None) for part in self.parts[0]),
                Site(attn, "logits", "attn_logits", "logit_scale"),
                Site(attn, "out", "attn_out", None),
                Site(f"{attn}.out", "out", "branch", None),
                Site(at, "attn_residual", "residual_attn", "attn_tau", 2 * i),
                Site(f"{mlp}_norm", "out", "norm", None),
                *(Site(f"{mlp}.{part}", "out", "hidden", None) for part in self.parts[1]),
                Site(mlp, "act", "ffn_act", "act_mult"),
                Site(f"{mlp}.down", "out", "branch", None),
                Site(at, "mlp_residual", "residual_ffn", "mlp_tau", 2 * i + 1),
            ]
        found += [Site("norm", "out", "norm", None), Site("head", "out", "readout", "multiplier")]
        return (*found, Site("", "loss_logits", "loss_logits", "loss_mult"))
