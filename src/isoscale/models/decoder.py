"""A Llama-style decoder: RoPE, SwiGLU, RMSNorm, grouped heads. One body for standard, muP and u-muP models.

`scaling="unit"` uses unit-scaled ops, `"plain"` torch's own: the same modules, so that the two differ in scale only.
Every multiplier of a parametrisation is a plain float attribute, listed by `Decoder.sites`; a plan may set it.
Factors of attention, SwiGLU and the residual add are folded into the next GEMM, which is why a unit-scaled step costs
hardly more than a plain one; a probe sees the logical value as `value * factor`, the factor being the folded part.
What is lost: the code below passes `pending` and the residual scales along instead of one op at a time. With dropout
or a probe the residual add runs unfolded, with equal results up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as torch_f
from torch import Tensor, nn

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.nn import functional as F
from isoscale.nn.attention import raw_attention, sdpa_factor
from isoscale.nn.factors import residual_scales, silu_glu_factor, transformer_residual_rule
from isoscale.nn.losses import loss_rows
from isoscale.nn.modules import Embedding, Linear, LinearReadout, RMSNorm, Scaling
from isoscale.nn.scale import residual_blend, times

Probe = Callable[[str, str, Tensor, float], None]
"""Called as `probe(path, port, value, factor)`: the logical tensor is `value * factor`, its gradient `value.grad /
factor`."""


@dataclass(frozen=True)
class Site:
    """One place in the forward pass.

    Attributes:
        path: module path, "" for the model.
        port: which tensor of that module.
        kind: what the tensor is, the key of site rules.
        attr: the float attribute of the module that scales the tensor, if any.
        index: residual branch index, 0 elsewhere.
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
    `norm="plain"` has no gains. The alphas are u-muP's (arXiv 2407.17465, Table 2) and only initialise attributes.
    """

    vocab: int = 256
    width: int = 64
    depth: int = 4
    head_size: int = 16
    kv_heads: int | None = None
    ffn_ratio: float = 3.0
    qk_norm: bool = False
    norm: Literal["plain", "trainable"] = "plain"
    tied: bool = False
    dropout: float = 0.0
    norm_eps: float = 1e-5
    scaling: Scaling = "unit"
    alpha_attn: float = 1.0
    alpha_ffn_act: float = 1.0
    alpha_res: float = 1.0
    alpha_res_attn_ratio: float = 1.0
    alpha_loss: float = 1.0

    def __post_init__(self) -> None:
        for key in ("vocab", "width", "depth", "head_size", "kv_heads"):
            size = getattr(self, key)
            if key == "kv_heads" and size is None:
                continue
            least = 2 if key == "vocab" else 1
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise ConfigError(f"{key} must be a whole number of at least {least}", key=key, value=size)
        for key in ("ffn_ratio", "norm_eps", "alpha_attn", "alpha_ffn_act", "alpha_loss"):
            _check_number(key, getattr(self, key), least=0, open_end=True)
        for key in ("alpha_res", "alpha_res_attn_ratio"):
            _check_number(key, getattr(self, key), least=0, open_end=False)
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout must be in [0, 1)", key="dropout", value=self.dropout)
        for key, choices in (("norm", ("plain", "trainable")), ("scaling", ("unit", "plain"))):
            if getattr(self, key) not in choices:
                value = getattr(self, key)
                raise ConfigError(f"unknown {key}", key=key, value=value, hint=did_you_mean(str(value), choices))
        if self.head_size % 2:
            raise ConfigError("rotary positions need an even head size", key="head_size", value=self.head_size)
        if self.width % self.head_size:
            raise ConfigError(
                "width must be a multiple of head_size",
                key="width",
                value=self.width,
                hint=f"{max(1, round(self.width / self.head_size)) * self.head_size} fits head_size {self.head_size}",
            )
        if self.heads % self.groups:
            fits = [count for count in range(1, self.heads + 1) if self.heads % count == 0]
            raise ConfigError(
                f"kv_heads must divide the {self.heads} heads",
                key="kv_heads",
                value=self.kv_heads,
                hint=f"one of {fits}",
            )

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


def _check_number(key: str, value: float, least: float, open_end: bool) -> None:
    good = (value > least if open_end else value >= least) and value != float("inf")
    if not good:
        sign = ">" if open_end else ">="
        raise ConfigError(f"{key} must be a finite number {sign} {least}", key=key, value=value)


class Attention(nn.Module):
    """Causal self-attention, `[batch, length, width]`; `logit_scale` is the full factor on q.k."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        size, scaling = config.head_size, config.scaling
        self.logit_scale = config.alpha_attn / size if scaling == "unit" else size**-0.5
        self.qkv = Linear(config.width, (config.heads + 2 * config.groups) * size, scaling=scaling)
        self.out = Linear(config.width, config.width, scaling=scaling)
        if config.qk_norm:
            affine = config.norm == "trainable"
            self.q_norm = RMSNorm(size, config.norm_eps, affine, scaling=scaling)
            self.k_norm = RMSNorm(size, config.norm_eps, affine, scaling=scaling)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], tokens: int | None, probe: Probe | None, path: str
    ) -> tuple[Tensor, float]:
        """The attention output before `out`, `[batch, length, width]`, and its pending factor."""
        config, (batch, length, _) = self.config, x.shape
        qkv = self.qkv(x, tokens=tokens)
        if probe is not None:
            probe(f"{path}.qkv", "out", qkv, 1.0)
        heads = qkv.view(batch, length, -1, config.head_size).transpose(1, 2)
        q, k, v = heads.split((config.heads, config.groups, config.groups), 1)
        if config.qk_norm:
            q = self.q_norm(q, tokens=tokens and tokens * config.heads)
            k = self.k_norm(k, tokens=tokens and tokens * config.groups)
        cos, sin = rope[0].to(q.dtype), rope[1].to(q.dtype)
        q, k = F.apply_rope(q, cos, sin), F.apply_rope(k, cos, sin)
        if probe is not None:
            probe(path, "logits", causal_scores(q, k), self.logit_scale)
        p = config.dropout if self.training else 0.0
        out = raw_attention(q, k, v, scale=self.logit_scale, is_causal=True, dropout_p=p)
        factor = 1.0
        if config.scaling == "unit":
            factor = sdpa_factor(q, k, scale=self.logit_scale, is_causal=True, dropout_p=p)
        out = out.transpose(1, 2).reshape(batch, length, -1)
        if probe is not None:
            probe(path, "out", out, factor)
        return out, factor


def causal_scores(q: Tensor, k: Tensor) -> Tensor:
    """All q.k that a causal mask lets through, `[batch, heads, length * (length + 1) / 2]`, without a gradient."""
    with torch.no_grad():
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return scores[..., seen]


class MLP(nn.Module):
    """SwiGLU, `[..., width]`; `act_mult` sharpens the gate.

    The two linears mirror each other's factors: forward `width^-1/2` here is the input-gradient factor there.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.scaling, self.act_mult = config.scaling, config.alpha_ffn_act
        width, hidden, scaling = config.width, config.hidden, config.scaling
        self.gate_up = Linear(width, 2 * hidden, constraint=None, grad_fan_out=hidden, scaling=scaling)
        self.down = Linear(hidden, width, constraint=None, scaling=scaling)

    def forward(self, x: Tensor, tokens: int | None, probe: Probe | None, path: str) -> tuple[Tensor, float]:
        """The gated activation before `down`, `[..., hidden]`, and its pending factor."""
        both = self.gate_up(x, tokens=tokens)
        gate, up = both.chunk(2, -1)
        active = torch_f.silu(times(gate, self.act_mult)) * up
        factor = (silu_glu_factor(self.act_mult) if self.scaling == "unit" else 1.0) / self.act_mult
        if probe is not None:
            probe(f"{path}.gate_up", "out", both, 1.0)
            probe(path, "act", active, factor)
        return active, factor


class Block(nn.Module):
    """Pre-norm block. `attn_tau` and `mlp_tau` weigh the branches: unit by the residual rule, plain as multipliers."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.config, self.unit = config, config.scaling == "unit"
        rule = transformer_residual_rule(config.alpha_res, config.alpha_res_attn_ratio)
        self.attn_tau, self.mlp_tau = (
            rule(2 * index + step, 2 * config.depth) if self.unit else 1.0 for step in (0, 1)
        )
        affine = config.norm == "trainable"
        self.attn_norm = RMSNorm(config.width, config.norm_eps, affine, scaling=config.scaling)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, affine, scaling=config.scaling)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], tokens: int | None, probe: Probe | None, path: str
    ) -> Tensor:
        """`[batch, length, width]` to the same."""
        scales = residual_scales(self.attn_tau) if self.unit else (self.attn_tau, 1.0)
        h, skip = self.attn_norm.split(x, branch_scale=scales[0], skip_scale=scales[1], tokens=tokens)
        if probe is not None:
            probe(f"{path}.attn_norm", "out", h, 1.0)
        h, pending = self.attn(h, rope, tokens, probe, f"{path}.attn")
        x = self._close(self.attn.out, h, pending, skip, scales, tokens, probe, path, "attn")

        scales = residual_scales(self.mlp_tau) if self.unit else (self.mlp_tau, 1.0)
        h, skip = self.mlp_norm.split(x, branch_scale=scales[0], skip_scale=scales[1], tokens=tokens)
        if probe is not None:
            probe(f"{path}.mlp_norm", "out", h, 1.0)
        h, pending = self.mlp(h, tokens, probe, f"{path}.mlp")
        return self._close(self.mlp.down, h, pending, skip, scales, tokens, probe, path, "mlp")

    def _close(
        self,
        linear: Linear,
        h: Tensor,
        pending: float,
        skip: Tensor,
        scales: tuple[float, float],
        tokens: int | None,
        probe: Probe | None,
        path: str,
        name: str,
    ) -> Tensor:
        """Last linear of a branch and the residual add, in one GEMM unless someone has to see or drop the branch."""
        drop = self.config.dropout if self.training else 0.0
        if probe is None and drop == 0:
            folded: Tensor = linear(
                h, pending=pending, skip=skip, branch_scale=scales[0], skip_scale=scales[1], tokens=tokens
            )
            return folded
        branch = linear(h, pending=pending, tokens=tokens)
        if probe is not None:
            probe(f"{path}.attn.out" if name == "attn" else f"{path}.mlp.down", "out", branch, 1.0)
        if drop:
            branch = F.dropout(branch, drop) if self.unit else torch_f.dropout(branch, drop)
        x = residual_blend(branch, skip, *scales) if self.unit else skip + times(branch, scales[0])
        if probe is not None:
            probe(path, f"{name}_residual", x, 1.0)
        return x


class Decoder(nn.Module):
    """Token ids `[batch, length]` to logits or loss. See `DecoderConfig`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.loss_mult = config.alpha_loss
        self.embed = Embedding(config.vocab, config.width, scaling=config.scaling)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps, config.norm == "trainable", scaling=config.scaling)
        self.head = LinearReadout(config.width, config.vocab, tied=config.tied, scaling=config.scaling)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, e.g. after `to_empty`."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

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
        config = self.config
        x = self.embed(ids, tokens=tokens)
        if probe is not None:
            probe("embed", "out", x, 1.0)
        rope = F.rope_tables(ids.shape[1], config.head_size, ids.device)
        for index, block in enumerate(self.blocks):
            x = block(x, rope, tokens, probe, f"blocks.{index}")
        x = self.norm(x, tokens=tokens)
        if probe is not None:
            probe("norm", "out", x, 1.0)
        logits: Tensor = self.head(x, tokens=tokens, weight=self.embed.weight if config.tied else None)
        if probe is not None:
            probe("head", "out", logits, 1.0)
        if targets is None:
            return logits
        if probe is not None:
            probe("", "loss_logits", logits, self.loss_mult)
        if config.scaling == "unit":
            return F.cross_entropy(logits, targets, mult=self.loss_mult)
        return torch_f.cross_entropy(*loss_rows(times(logits, self.loss_mult), targets))

    def sites(self) -> tuple[Site, ...]:
        """Every port that a probe sees, in forward order."""
        found = [Site("embed", "out", "embedding", "multiplier")]
        for i in range(self.config.depth):
            at = f"blocks.{i}"
            found += [
                Site(f"{at}.attn_norm", "out", "norm", None),
                Site(f"{at}.attn.qkv", "out", "hidden", None),
                Site(f"{at}.attn", "logits", "attn_logits", "logit_scale"),
                Site(f"{at}.attn", "out", "attn_out", None),
                Site(f"{at}.attn.out", "out", "branch", None),
                Site(at, "attn_residual", "residual_attn", "attn_tau", 2 * i),
                Site(f"{at}.mlp_norm", "out", "norm", None),
                Site(f"{at}.mlp.gate_up", "out", "hidden", None),
                Site(f"{at}.mlp", "act", "ffn_act", "act_mult"),
                Site(f"{at}.mlp.down", "out", "branch", None),
                Site(at, "mlp_residual", "residual_ffn", "mlp_tau", 2 * i + 1),
            ]
        found.append(Site("norm", "out", "norm", None))
        found.append(Site("head", "out", "readout", "multiplier"))
        return (*found, Site("", "loss_logits", "loss_logits", "loss_mult"))
