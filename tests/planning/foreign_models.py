"""Models that isoscale did not make: Hugging Face, timm and hand-written ones, all from a config, tiny.

Each builder is `NAME(width=64, depth=2) -> nn.Module`; width scales the number of heads (head size 16), depth the
number of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

HEAD, VOCAB = 16, 256
Builder = Callable[[int, int], nn.Module]


def _declare_torchvision() -> None:
    """Its Python half asks for these operators at import; beside a torch of another build its C++ half is not there."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # a torchvision that fits
            return
    _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []
try:
    import torchvision  # noqa: F401
except RuntimeError:
    _declare_torchvision()
except ImportError:
    pass


def llama(width: int = 64, depth: int = 2, **changes: Any) -> nn.Module:
    """RMSNorm, rope, SwiGLU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, head_dim=HEAD,
        num_attention_heads=width // HEAD, num_key_value_heads=width // HEAD, max_position_embeddings=128, **changes,
    ))  # fmt: skip


def mistral(width: int = 64, depth: int = 2, **changes: Any) -> nn.Module:
    """Llama with half as many key and value heads."""
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, head_dim=HEAD,
        num_attention_heads=width // HEAD, num_key_value_heads=width // HEAD // 2, max_position_embeddings=128, **changes,
    ))  # fmt: skip


def qwen3(width: int = 64, depth: int = 2, **changes: Any) -> nn.Module:
    """Norms on queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, head_dim=HEAD,
        num_attention_heads=width // HEAD, num_key_value_heads=width // HEAD, max_position_embeddings=128, **changes,
    ))  # fmt: skip


def gpt2(width: int = 64, depth: int = 2, **changes: Any) -> nn.Module:
    """Fused QKV in a Conv1D ([in, out]), tied embeddings, learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB, n_positions=128, n_embd=width, n_layer=depth, n_head=width // HEAD, **changes
    ))  # fmt: skip


def gptj(width: int = 64, depth: int = 2, **changes: Any) -> nn.Module:
    """Attention and MLP beside each other."""
    from transformers import GPTJConfig, GPTJForCausalLM

    return GPTJForCausalLM(GPTJConfig(
        vocab_size=VOCAB, n_positions=128, n_embd=width, n_layer=depth, n_head=width // HEAD, rotary_dim=HEAD // 2, **changes
    ))  # fmt: skip


def bert(width: int = 64, depth: int = 2, **changes: Any) -> nn.Module:
    """Norms after the adds, an encoder with a masked-LM head."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
        num_attention_heads=width // HEAD, max_position_embeddings=128, **changes,
    ))  # fmt: skip


def vit(width: int = 64, depth: int = 2, **changes: Any) -> nn.Module:
    """An image classifier of Hugging Face."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        image_size=32, patch_size=8, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
        num_attention_heads=width // HEAD, num_labels=10, **changes,
    ))  # fmt: skip


def mixtral(width: int = 64, depth: int = 2, **changes: Any) -> nn.Module:
    """Eight experts, two per token, each kind of expert weight one 3-D tensor."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth, head_dim=HEAD,
        num_attention_heads=width // HEAD, num_key_value_heads=width // HEAD, max_position_embeddings=128, **changes,
    ))  # fmt: skip


def mamba(width: int = 64, depth: int = 2, **changes: Any) -> nn.Module:
    """No attention: a selective scan."""
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=width, num_hidden_layers=depth, **changes))


def t5(width: int = 64, depth: int = 2, **changes: Any) -> nn.Module:
    """Encoder and decoder, no attention scale, a table of relative positions."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(
        vocab_size=VOCAB, d_model=width, d_kv=HEAD, d_ff=4 * width, num_layers=depth, num_heads=width // HEAD, **changes
    ))  # fmt: skip


def timm_vit(width: int = 64, depth: int = 2, **changes: Any) -> nn.Module:
    """An image classifier of timm."""
    timm = pytest.importorskip("timm.models.vision_transformer", exc_type=ImportError)
    return timm.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=width, depth=depth, num_heads=width // HEAD, num_classes=10, **changes
    )


class _BasicBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.down = None
        if stride != 1 or inner != outer:
            self.down = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.down is None else self.down(x)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """Two stages of basic blocks."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        blocks = [_BasicBlock(width, width, 1) for _ in range(depth)]
        blocks += [_BasicBlock(width if i == 0 else 2 * width, 2 * width, 2 if i == 0 else 1) for i in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet(width: int = 64, depth: int = 2) -> nn.Module:
    """Convolutions and batch norms; `depth` blocks in each of two stages."""
    return ResNet(width, depth)


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_head = width // HEAD

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            y.view(batch, length, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(width, dim=2)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        att = F.softmax(att.masked_fill(~mask, float("-inf")), dim=-1)
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(batch, length, width))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), _Attention(width)
        self.ln_2, self.mlp = nn.LayerNorm(width), _MLP(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """In the style of nanoGPT: fused QKV, attention spelt out, initialised by `self.apply`."""

    def __init__(self, width: int, depth: int, tied: bool) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(128, width)
        self.h = nn.ModuleList([_Block(width) for _ in range(depth)])
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def nanogpt(width: int = 64, depth: int = 2, tied: bool = True) -> nn.Module:
    """A hand-written GPT."""
    return NanoGPT(width, depth, tied)


class Experts(nn.Module):
    """Experts in a list, each token to two of them, and a shared one behind a gate."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.gate, self.shared_gate = nn.Linear(width, count, bias=False), nn.Linear(width, 1)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 8), nn.SiLU(), nn.Linear(8, width)) for _ in range(count))
        self.shared = nn.Sequential(nn.Linear(width, 8), nn.SiLU(), nn.Linear(8, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = F.softmax(self.gate(x), -1).topk(2, -1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == i)
            if row.numel():
                out.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
        return out + torch.sigmoid(self.shared_gate(x)) * self.shared(x)


BUILDERS: dict[str, Builder] = {
    builder.__name__: builder
    for builder in (llama, mistral, qwen3, gpt2, gptj, bert, vit, mixtral, mamba, t5, timm_vit, resnet, nanogpt)
}
