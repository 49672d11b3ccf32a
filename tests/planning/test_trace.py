"""The trace of foreign models says what their authors would: exact expectations per model, on the CPU and on meta."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from foreign_models import BUILDERS
from torch import nn

from isoscale.planning.names import pattern
from isoscale.planning.trace import Trace, trace

NO_ATTENTION = ("mamba", "resnet")


def build(name: str, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return BUILDERS[name](64, 2)


@cache
def traced(name: str, device: str = "cpu") -> Trace:
    return trace(build(name, device))


def both(stem: str) -> set[str]:
    return {f"{stem}.weight", f"{stem}.bias"}


@dataclass(frozen=True)
class Expected:
    """What the trace must say; block numbers as `*`.

    Args:
        branches: ends of the branches of one block, in order.
        queries: of every attention.
        feeds: readout -> what makes its input.
        after: used after the last residual add.
        outside: neither inside a branch nor after the last add.
    """

    branches: list[set[str]]
    feeds: dict[str, set[str]]
    after: set[str]
    outside: set[str]
    queries: set[str] = frozenset()  # type: ignore[assignment]
    scale: float = 0.25
    fused: bool = False
    routers: set[str] = frozenset()  # type: ignore[assignment]


LLAMA = Expected(
    branches=[{"model.layers.*.self_attn.o_proj.weight"}, {"model.layers.*.mlp.down_proj.weight"}],
    feeds={"lm_head.weight": {"model.norm.weight"}}, after={"lm_head.weight", "model.norm.weight"},
    outside={"model.embed_tokens.weight"}, queries={"model.layers.*.self_attn.q_proj.weight"},
)  # fmt: skip
QWEN3 = Expected(LLAMA.branches, LLAMA.feeds, LLAMA.after, LLAMA.outside, {"model.layers.*.self_attn.q_norm.weight"})
MIXTRAL = Expected(
    [LLAMA.branches[0], {"model.layers.*.mlp.experts.down_proj"}], LLAMA.feeds, LLAMA.after, LLAMA.outside,
    LLAMA.queries, routers={"model.layers.*.mlp.gate.weight"},
)  # fmt: skip
BERT_LAYER = "bert.encoder.layer.*"
EXPECTED: dict[str, Expected] = {
    "llama": LLAMA, "mistral": LLAMA, "qwen3": QWEN3, "mixtral": MIXTRAL,
    "gpt2": Expected(
        branches=[both("transformer.h.*.attn.c_proj"), both("transformer.h.*.mlp.c_proj")],
        feeds={"transformer.wte.weight": both("transformer.ln_f")},
        after={"transformer.wte.weight", *both("transformer.ln_f")}, outside={"transformer.wpe.weight"},
        queries=both("transformer.h.*.attn.c_attn"), fused=True,
    ),
    "gptj": Expected(
        branches=[{"transformer.h.*.attn.out_proj.weight", *both("transformer.h.*.mlp.fc_out")}],
        feeds={"lm_head.weight": both("transformer.ln_f")}, after={*both("lm_head"), *both("transformer.ln_f")},
        outside={"transformer.wte.weight"}, queries={"transformer.h.*.attn.q_proj.weight"},
    ),
    "bert": Expected(
        branches=[both(f"{BERT_LAYER}.attention.output.dense"), both(f"{BERT_LAYER}.output.dense")],
        feeds={"cls.predictions.transform.dense.weight": both("bert.encoder.layer.1.output.LayerNorm"),
               "bert.embeddings.word_embeddings.weight": both("cls.predictions.transform.LayerNorm")},
        after={"bert.embeddings.word_embeddings.weight", "cls.predictions.bias", *both(f"{BERT_LAYER}.output.LayerNorm"),
               *both("cls.predictions.transform.dense"), *both("cls.predictions.transform.LayerNorm")},
        outside={"bert.embeddings.position_embeddings.weight", "bert.embeddings.token_type_embeddings.weight",
                 *both("bert.embeddings.LayerNorm"), *both(f"{BERT_LAYER}.attention.output.LayerNorm"),
                 *both(f"{BERT_LAYER}.output.LayerNorm")},
        queries=both(f"{BERT_LAYER}.attention.self.query"),
    ),
    "vit": Expected(
        branches=[both("vit.layers.*.attention.o_proj"), both("vit.layers.*.mlp.fc2")],
        feeds={"classifier.weight": both("vit.layernorm")}, after={*both("classifier"), *both("vit.layernorm")},
        outside={"vit.embeddings.cls_token", "vit.embeddings.position_embeddings",
                 *both("vit.embeddings.patch_embeddings.projection")},
        queries=both("vit.layers.*.attention.q_proj"),
    ),
    "timm_vit": Expected(
        branches=[both("blocks.*.attn.proj"), both("blocks.*.mlp.fc2")], feeds={"head.weight": both("norm")},
        after={*both("head"), *both("norm")}, outside={"cls_token", "pos_embed", *both("patch_embed.proj")},
        queries=both("blocks.*.attn.qkv"), fused=True,
    ),
    "mamba": Expected(
        branches=[{"backbone.layers.*.mixer.out_proj.weight"}],
        feeds={"backbone.embeddings.weight": {"backbone.norm_f.weight"}},
        after={"backbone.embeddings.weight", "backbone.norm_f.weight"}, outside=set(),
    ),
    "nanogpt": Expected(
        branches=[both("h.*.attn.c_proj"), both("h.*.mlp.c_proj")], feeds={"wte.weight": both("ln_f")},
        after={"wte.weight", *both("ln_f")}, outside={"wpe.weight"}, queries=both("h.*.attn.c_attn"), fused=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_branches_attention_and_readouts(name: str) -> None:
    found, want = traced(name), EXPECTED[name]
    assert [{pattern(end) for end in branch.ends} for branch in found.branches] == 2 * want.branches
    assert {name: set(feeds) for name, feeds in found.feeds.items()} == want.feeds
    assert {pattern(name) for name, use in found.uses.items() if use.after} == want.after
    outside = {pattern(name) for name, use in found.uses.items() if not use.after and not use.inside}
    assert outside == want.outside
    assert {pattern(name) for name, use in found.uses.items() if use.routes} == want.routers
    assert found.unused == ()
    assert len(found.attention) == (0 if name in NO_ATTENTION else 2)
    for attention in found.attention:
        assert {pattern(query) for query in attention.queries} == want.queries
        assert (attention.head_size, attention.scale, attention.fused) == (16, want.scale, want.fused)


@pytest.mark.parametrize("name", BUILDERS)
def test_meta_and_real_models_give_the_same_trace(name: str) -> None:
    assert traced(name) == traced(name, "meta")


@pytest.mark.parametrize("name", BUILDERS)
def test_uses_are_the_parameters_that_gradients_reach(name: str) -> None:
    from isoscale.planning.example import make_example

    model = build(name).eval()
    example = make_example(model)
    out = model(*example.args, **example.kwargs)
    values = out.logits if hasattr(out, "logits") else out
    values.float().square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(traced(name).uses) == reached


def test_blocks_of_one_model_are_named_by_their_path() -> None:
    assert [branch.path for branch in traced("nanogpt").branches] == ["h.0", "h.0", "h.1", "h.1"]
    assert [attention.path for attention in traced("nanogpt").attention] == ["h.0.attn", "h.1.attn"]


def test_kinds_and_fan_in() -> None:
    gpt2, llama, vit = traced("gpt2").uses, traced("llama").uses, traced("vit").uses
    assert gpt2["transformer.h.0.attn.c_attn.weight"].contracted == (0,)  # Conv1D is [in, out]
    assert llama["model.layers.0.self_attn.q_proj.weight"].contracted == (1,)
    assert gpt2["transformer.wte.weight"].kinds == {"lookup", "matmul"}
    assert gpt2["transformer.wte.weight"].contracted == (1,)
    assert gpt2["transformer.wpe.weight"].kinds == {"lookup"}
    assert gpt2["transformer.h.0.attn.c_attn.bias"].kinds == {"shift"}
    assert not gpt2["transformer.h.0.attn.c_attn.bias"].normalised
    assert gpt2["transformer.h.0.ln_1.weight"].kinds == {"gain"}
    assert gpt2["transformer.h.0.ln_1.weight"].normalised
    assert gpt2["transformer.h.0.ln_1.bias"].normalised
    assert llama["model.norm.weight"].normalised
    assert vit["vit.embeddings.cls_token"].kinds == vit["vit.embeddings.position_embeddings"].kinds == {"shift"}
    assert vit["vit.embeddings.patch_embeddings.projection.weight"].contracted == (1, 2, 3)


def test_state_space_parameters() -> None:
    uses = traced("mamba").uses
    mixer = {name.rpartition("mixer.")[2]: use for name, use in uses.items() if ".0.mixer." in name}
    assert mixer["A_log"].kinds == {"other"}
    assert mixer["D"].kinds == {"gain"}
    assert not mixer["D"].normalised
    assert (mixer["conv1d.weight"].kinds, mixer["conv1d.weight"].groups) == ({"conv"}, 128)
    assert mixer["dt_proj.bias"].kinds == {"shift"}
    assert all(use.inside for use in mixer.values())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_experts_are_seen_however_they_are_computed(implementation: str, device: str) -> None:
    from foreign_models import mixtral

    with torch.device(device):
        model = mixtral(experts_implementation=implementation)
    found = trace(model)
    assert found == traced("mixtral")
    use = found.uses["model.layers.0.mlp.experts.down_proj"]
    assert (use.kinds, use.contracted, use.inside) == ({"matmul"}, (2,), True)  # [experts, out, in]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_spelt_out_and_fused_agree(device: str) -> None:
    from foreign_models import llama

    with torch.device(device):
        found = trace(llama(attn_implementation="eager"))
    assert found == traced("llama")


def test_a_scale_of_ones_own_is_read() -> None:
    from foreign_models import llama

    model = llama()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.3
    assert [attention.scale for attention in trace(model).attention] == [0.3, 0.3]


def test_encoder_and_decoder() -> None:
    found = traced("t5")
    assert len(found.branches) == 2 * 2 + 2 * 3
    assert {attention.scale for attention in found.attention} == {1.0}  # T5 has none
    assert found.uses["decoder.block.1.layer.1.EncDecAttention.k.weight"].inside  # reads the encoder, not the stream
    assert found.uses["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].inside
    assert not found.uses["encoder.final_layer_norm.weight"].inside
    assert not found.uses["encoder.final_layer_norm.weight"].after
    assert found.feeds == {"shared.weight": {"decoder.final_layer_norm.weight"}}


def test_convolutions_with_batch_norm() -> None:
    found = traced("resnet")
    ends = [both(f"blocks.{i}.bn2") for i in (0, 1, 3)]  # block 2 projects its skip: no identity, no branch
    assert [set(branch.ends) for branch in found.branches] == ends
    assert found.uses["blocks.0.conv1.weight"].inside
    assert not found.uses["blocks.2.down.0.weight"].inside
    assert found.uses["blocks.0.bn1.weight"].normalised
    assert found.feeds == {"fc.weight": frozenset()}  # pooled raw stream
