"""Hugging Face configs at any size: heads, groups, MLP and layers follow; what is cut is said."""

import pytest
import torch

from isoscale._base.errors import ConfigError, PlanError
from isoscale.check import run_check
from isoscale.check.hf import hf_builder
from isoscale.check.subject import resolve
from isoscale.check.task import make_task


@pytest.fixture
def llama(hf, tmp_path):
    hf.LlamaConfig(vocab_size=32000, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=1376,
                   num_key_value_heads=2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # fmt: skip
    return tmp_path


def test_a_llama_grows_by_heads_of_one_size(llama):
    build, notes = hf_builder(llama, 64)
    config = build(128, 3).config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (128, 3, 512)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 2, 16)
    assert config.intermediate_size == 344
    assert notes == ("vocabulary 32000 -> 512", "head size 64 -> 16")
    heads = {build(width, 1).model.layers[0].self_attn.head_dim for width in (64, 128, 256)}
    assert heads == {16}


def test_heads_keep_their_size_where_they_fit(llama):
    build, notes = hf_builder(llama, 256)
    assert build(256, 1).config.num_attention_heads == 4
    assert notes == ("vocabulary 32000 -> 512",)


def test_the_config_file_does_as_well_as_its_folder(llama):
    assert type(hf_builder(llama / "config.json", 64)[0](64, 1)).__name__ == "LlamaForCausalLM"


def test_a_gpt2_has_its_own_names_for_sizes(hf, tmp_path):
    hf.GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    model = hf_builder(tmp_path, 64)[0](128, 3)
    assert len(model.transformer.h) == 3
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (128, 512)
    assert model.config.n_head == 8


def test_layer_types_are_cut_with_the_layers(hf, tmp_path):
    hf.Qwen3Config(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
                   architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)  # fmt: skip
    config = hf_builder(tmp_path, 64)[0](64, 6).config
    assert len(config.layer_types) == 6


def test_a_vision_model_gets_images(hf, tmp_path):
    hf.ViTConfig(architectures=["ViTForImageClassification"], num_labels=10).save_pretrained(tmp_path)
    built = resolve(str(tmp_path), smallest=64, unit=False).build(64, 1)
    task = make_task(built, 0, None)
    assert task.batch(0)["pixel_values"].shape == (16, 3, 64, 64)
    assert torch.isfinite(task.loss(built.model, task.batch(0)))


def test_a_masked_model_is_asked_for_what_was_masked(hf, tmp_path, small_text):
    hf.BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    built = resolve(str(tmp_path), smallest=64, unit=False).build(64, 1)
    task = make_task(built, 0, str(small_text))
    assert task.loss(built.model, task.batch(0)).item() == pytest.approx(6.24, abs=0.3)  # ln 512


@pytest.mark.parametrize(("content", "message"), [
    ("{}", "not a Hugging Face config"), ("no json", "not a Hugging Face config"),
    ('{"model_type": "bert", "architectures": ["BertForQuestionAnswering"]}', "no way to check"),
])  # fmt: skip
def test_a_config_that_is_none_is_refused(hf, tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        hf_builder(tmp_path, 64)


def test_a_width_that_heads_do_not_fill_is_refused(llama):
    with pytest.raises(PlanError, match="no whole number of heads of 16"):
        hf_builder(llama, 64)[0](100, 1)


def test_gpt2_as_it_is_fails_and_its_init_is_named(hf, tmp_path, quick):
    hf.GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    found = run_check(str(tmp_path), tmp_path / "out", quick(rule="none"))
    assert found.verdict == "fails"
    assert found.suspects[0].name == "transformer.h.0.attn.c_attn"
    assert "init" in found.suspects[0].why


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_complete_d_keeps_hugging_face_models_flat_over_both_axes(hf, tmp_path, quick, kind):
    name = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM"}[kind]
    getattr(hf, f"{kind}Config")(architectures=[name]).save_pretrained(tmp_path)
    settings = {"widths": (64, 128, 256), "depths": (2, 4, 8), "steps": 5}
    assert run_check(str(tmp_path), tmp_path / "a", quick(rule="complete-d", **settings)).passes
    as_it_is = run_check(str(tmp_path), tmp_path / "b", quick(rule="none", **settings))
    assert {one.axis for one in as_it_is.suspects} == {"width", "depth"}
