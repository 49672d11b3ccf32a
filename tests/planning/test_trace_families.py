"""More families of language models, one fact each that a trace by names or classes would get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from isoscale.planning.names import pattern
from isoscale.planning.trace import Trace, trace

SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip


def traced(config: str, model: str, device: str, **settings: Any) -> Trace:
    made = getattr(transformers, config)(**{**SMALL, **settings})
    with torch.device(device):
        return trace(getattr(transformers, model)(made))


def ends(found: Trace) -> list[set[str]]:
    return [{pattern(end) for end in branch.ends} for branch in found.branches]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gemma_multiplies_by_one_plus_the_gain_and_caps_its_scores(device: str) -> None:
    found = traced("Gemma2Config", "Gemma2ForCausalLM", device, head_dim=16, query_pre_attn_scalar=64)
    assert ends(found) == [set()] * 4  # norms after each branch whose gains are 1 + w: nothing scales them exactly
    assert found.uses["model.layers.0.post_feedforward_layernorm.weight"].normalised
    assert {attention.scale for attention in found.attention} == {0.125}
    assert found.feeds == {"model.embed_tokens.weight": frozenset()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_norms_at_the_end_of_a_branch_end_it(device: str) -> None:
    found = traced("Olmo2Config", "Olmo2ForCausalLM", device)
    norms = [{"model.layers.*.post_attention_layernorm.weight"}, {"model.layers.*.post_feedforward_layernorm.weight"}]
    assert ends(found) == 2 * norms


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_multipliers_of_the_model_are_seen(device: str) -> None:
    found = traced("GraniteConfig", "GraniteForCausalLM", device, attention_multiplier=0.1, residual_multiplier=0.3)
    assert {attention.scale for attention in found.attention} == {0.1}
    assert all(ends(found))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_biases_of_experts_are_shifts_and_sinks_are_no_weights(device: str) -> None:
    found = traced("GptOssConfig", "GptOssForCausalLM", device, num_local_experts=8, head_dim=16)
    experts = "model.layers.*.mlp.experts"
    assert ends(found)[1] == {f"{experts}.down_proj", f"{experts}.down_proj_bias"}
    assert found.uses["model.layers.0.mlp.experts.down_proj_bias"].kinds == {"shift"}
    assert found.uses["model.layers.0.mlp.experts.gate_up_proj"].contracted == (1,)  # [experts, in, out]
    assert found.uses["model.layers.0.self_attn.sinks"].kinds == {"shift"}
    assert found.uses["model.layers.0.mlp.router.weight"].routes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_routers_by_sigmoid_and_groups_and_attention_through_low_rank(device: str) -> None:
    found = traced(
        "DeepseekV3Config", "DeepseekV3ForCausalLM", device, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4,
        moe_intermediate_size=32, first_k_dense_replace=1,
    )  # fmt: skip
    routers = {name for name, use in found.uses.items() if use.routes}
    assert routers == {"model.layers.1.mlp.gate.weight"}
    down = {"model.layers.*.mlp.experts.down_proj", "model.layers.*.mlp.shared_experts.down_proj.weight"}
    assert ends(found)[3] == down
    for attention in found.attention:
        assert {pattern(query) for query in attention.queries} == {"model.layers.*.self_attn.q_b_proj.weight"}
        assert attention.head_size == 24
        assert attention.scale == pytest.approx(24**-0.5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shared_experts_behind_a_gate(device: str) -> None:
    found = traced(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", device, moe_intermediate_size=32, shared_expert_intermediate_size=64,
        num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    routers = {pattern(name) for name, use in found.uses.items() if use.routes}
    assert routers == {"model.layers.*.mlp.gate.weight", "model.layers.*.mlp.shared_expert_gate.weight"}
    down = {"model.layers.*.mlp.experts.down_proj", "model.layers.*.mlp.shared_expert.down_proj.weight"}
    assert ends(found)[1] == down


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parallel_blocks_with_two_adds(device: str) -> None:
    found = traced("CohereConfig", "CohereForCausalLM", device)
    assert ends(found) == 2 * [{"model.layers.*.self_attn.o_proj.weight"}, {"model.layers.*.mlp.down_proj.weight"}]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scores_with_products_of_positions_beside_them(device: str) -> None:
    with torch.device(device):
        found = trace(transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            relative_attention=True, pos_att_type=["p2c", "c2p"],
        )))  # fmt: skip
    assert len(found.attention) == 2
    for attention in found.attention:
        assert attention.queries == {
            f"{attention.path}.query_proj.weight", f"{attention.path}.query_proj.bias",
        }  # fmt: skip
        assert attention.scale == pytest.approx((3 * 16) ** -0.5)
