"""Recipes on whole models: which blocks are kept, plans and conversions that agree, the BF16 finish, models of others."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import isoscale as iso
from isoscale._base.errors import ConfigError, PlanError
from isoscale.formats.recipes import BF16, LayerFormats, Recipe, recipe_by_name
from isoscale.models import Decoder, DecoderConfig
from isoscale.numerics import CastLinear, cast_stats, convert, summary, switch

IDS = torch.arange(96).view(4, 24) % 64
NVFP4 = recipe_by_name("nvfp4")


def decoder(depth: int = 2) -> Decoder:
    """Width 32, u-muP."""
    return Decoder(DecoderConfig(vocab=64, width=32, depth=depth, head_size=16))


def ready(depth: int = 2) -> Decoder:
    """The same, with weights."""
    model = decoder(depth)
    iso.plan(model, "u-mup").apply(model)
    return model


def kept(layers: dict[str, LayerFormats]) -> set[int]:
    return {int(path.split(".")[1]) for path, formats in layers.items() if path.startswith("blocks") and formats == BF16}


@pytest.mark.parametrize(("keep", "depth", "wanted"), [
    ((2 / 62, 8 / 62), 4, {3}), ((2 / 62, 8 / 62), 2, set()), ((0.0, 0.0), 4, set()), ((0.25, 0.25), 4, {0, 3}),
    ((0.125, 0.0), 4, {0}), ((0.12, 0.0), 4, set()), ((1.0, 0.0), 2, {0, 1}), ((0.6, 0.6), 4, {0, 1, 2, 3}),
])  # fmt: skip
def test_kept_blocks_are_those_of_the_shares(keep: tuple[float, float], depth: int, wanted: set[int]) -> None:
    """Half up: 0.125 of four blocks is half a block, which counts as one; 0.12 as none."""
    model = convert(decoder(depth), replace(NVFP4, keep=keep))
    assert kept(summary(model).layers) == wanted


def test_the_published_model_keeps_its_first_two_and_last_eight() -> None:
    paths = [f"model.layers.{i}.mlp.up" for i in range(62)]
    found = NVFP4.on(paths)
    assert [i for i, path in enumerate(paths) if found.formats(path) == BF16] == [0, 1, *range(54, 62)]
    assert "block 61 of 62 is in the last 0.129 (8)" in found.reason(paths[61])
    assert "kept" not in found.reason(paths[30])
    assert found.formats("lm_head") == BF16
    assert "kept" not in found.reason("lm_head")


@pytest.mark.parametrize(("paths", "wanted"), [
    (["h.0.attn", "h.1.attn", "h.2.mlp.experts.7.up"], {"h": 3}),
    (["encoder.layers.0.a", "encoder.layers.1.a", "decoder.layers.0.a"], {"encoder.layers": 2, "decoder.layers": 1}),
    (["0", "1", "2"], {}), (["0.a", "1.b"], {"": 2}), (["blocks.10.x.y", "blocks2.a"], {"blocks": 11}),
])  # fmt: skip
def test_what_counts_as_a_block(paths: list[str], wanted: dict[str, int]) -> None:
    assert dict(NVFP4.on(paths).blocks) == wanted


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_plan_and_conversion_agree(name: str) -> None:
    """With the plan and without it, on a model of ours and on a foreign one, with shares of one's own."""
    recipe = recipe_by_name(name).changed(keep_first=0.25, keep_last=0.25)
    plan = iso.plan(decoder(4), "u-mup", recipe=recipe)
    for made in (convert(decoder(4), recipe), convert(decoder(4), recipe, plan=plan)):
        layers = summary(made).layers
        assert len(layers) == 17
        assert kept(layers) == {0, 3}
        for path, formats in layers.items():
            assert plan.row(f"{path}.weight").formats == formats
    reason = plan.row("blocks.3.mlp.down.weight").reasons["formats"]
    assert reason == f"w bf16, x bf16, g bf16 = recipe {name}, kept: block 3 of 4 is in the last 0.25 (1)"
    back = iso.Plan.from_json(plan.to_json())
    assert [row.formats for row in back.rows] == [row.formats for row in plan.rows]


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=128, n_positions=32, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def test_gpt2_of_hugging_face() -> None:
    """Its Conv1D holds the weight as [in, out]; it is cast like a linear layer, along its own contraction axis."""
    model, ids = gpt2(), torch.arange(64).view(2, 32) % 128
    model.eval()
    before = model(ids, labels=ids).loss
    plan = iso.plan(gpt2(), "mup", base=gpt2(), recipe="nvfp4", hps={"lr": 0.01}, example={"input_ids": ids})
    twin = convert(copy.deepcopy(model), "nvfp4", plan=plan)
    convert(model, "nvfp4")
    layers = summary(model).layers
    assert summary(twin).layers == layers
    assert {path.split(".")[-1] for path in layers} == {"c_attn", "c_proj", "c_fc", "lm_head"}
    assert {path.split(".")[2] for path, f in layers.items() if f == BF16 and path != "lm_head"} == {"3"}
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.features == (64, 256)
    assert "Conv1D 64 -> 256" in repr(layer)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert 0 < abs(float(loss.detach() - before.detach())) < 0.1
    assert layer.weight.grad.shape == (64, 256)
    rows = {row["operand"]: row for row in cast_stats(model, lambda: model(ids, labels=ids).loss) if row["layer"].endswith("h.0.mlp.c_fc")}
    assert rows["weight"]["axis"] == -2
    assert rows["input"]["axis"] == -1


def test_conv1d_has_the_gradients_of_a_linear() -> None:
    """[in, out] and [out, in], nearest rounding: the same bits."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    left, right = conv1d(48, 64), nn.Linear(64, 48)
    with torch.no_grad():
        right.weight.copy_(left.weight.t() * 50)
        left.weight.mul_(50)
        left.bias.copy_(right.bias)
    formats = recipe_by_name("mxfp8").formats("a")
    x = torch.randn(7, 64)
    for layer in (left, right):
        cast = CastLinear(layer, formats, "emulated")
        cast(x).square().sum().backward()
    torch.testing.assert_close(left.weight.grad, right.weight.grad.t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(left.bias.grad, right.bias.grad, rtol=1e-5, atol=1e-4)


def test_switch_gives_the_converted_layers_other_formats() -> None:
    """As converted that way from the start; layers that were not cast stay out; a refusal changes nothing."""
    model = convert(ready(4), "nvfp4")
    wanted = convert(ready(4), "bf16")
    assert float(model(IDS, IDS)) != float(wanted(IDS, IDS))
    assert switch(model, "bf16") is model
    assert torch.equal(model(IDS, IDS), wanted(IDS, IDS))
    assert summary(model).layers == summary(wanted).layers
    assert summary(switch(model, NVFP4)).layers == summary(convert(ready(4), "nvfp4")).layers
    assert set(summary(switch(model, BF16)).layers.values()) == {BF16}
    with pytest.raises(ConfigError, match="unknown recipe"):
        switch(model, "fb16")
    with pytest.raises(ConfigError, match="no FP8 matmul"):
        switch(model, "mxfp8", backend="scaled_mm")
    assert set(summary(model).layers.values()) == {BF16}
    with pytest.raises(PlanError, match="no cast layers"):
        switch(ready(), "bf16")


def test_compiled_code_notices_the_switch() -> None:
    torch._dynamo.reset()
    model = convert(ready(1), "mxfp8")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(IDS, IDS)
        switch(model, "bf16")
        after = compiled(IDS, IDS)
        torch.testing.assert_close(after, model(IDS, IDS), rtol=1e-6, atol=1e-6)
    assert abs(float(before - after)) > 1e-6


def test_logged_casts_are_of_tensors_as_they_are_cast() -> None:
    """After transform and factor: mxfp4's backward operands clip nothing and are three quarters of themselves."""
    model = convert(ready(), "mxfp4")
    rows = [row for row in cast_stats(model, lambda: model(IDS, IDS)) if row["layer"] == "blocks.0.mlp.gate_up"]
    by = {row["operand"]: row for row in rows}
    assert set(by) == {"input", "weight", "grad", "backward_weight", "weight_grad", "backward_input"}
    assert all(by[name]["clipped"] == 0 for name in ("grad", "backward_weight", "weight_grad", "backward_input"))
    assert by["weight"]["clipped"] > 0
    assert by["backward_weight"]["rms"] == pytest.approx(0.75 * by["weight"]["rms"], rel=1e-3)
    assert by["backward_weight"]["format"] == "mxfp4/rceil"


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "mxfp4", "nvfp4", "mxfp8-e5m2-grad"])
def test_gradients_point_the_right_way(name: str) -> None:
    """Beside the plain model's: a small angle for 8 bits, a larger one for 4."""
    left, right = ready(), convert(ready(), name)
    left(IDS, IDS).backward()
    right(IDS, IDS).backward()
    a, b = (torch.cat([p.grad.flatten() / (p.grad.norm() + 1e-9) for p in m.parameters()]) for m in (left, right))
    cosine = float(nn.functional.cosine_similarity(a, b, dim=0))
    low = {"mxfp8": 0.99, "mxfp8-e5m2-grad": 0.98, "mxfp6": 0.97, "nvfp4": 0.85, "mxfp4": 0.7}[name]
    assert low < cosine < 1


def test_the_plan_shows_every_choice() -> None:
    recipe = NVFP4.changed(finish=0.1)
    plan = iso.plan(decoder(4), "u-mup", recipe=recipe)
    shown = str(plan)
    for words in ("finish: the last 0.1 of the run", "SR g in dX, g in dW", "H16 in", "nvfp4/amax/16x16",
                  "blocks.3.attn.qkv", "(SR rounded stochastically", "recipe nvfp4: NVFP4 as in arXiv"):  # fmt: skip
        assert words in shown, words
    assert max(map(len, shown.splitlines())) <= 80
    assert "kept: block 3 of 4" in " ".join(plan.explain("blocks.3.attn.qkv.weight").split())
    data = json.loads(plan.to_json())
    assert data["finish"] == 0.1
    formats = next(row["formats"] for row in data["rows"] if row["name"] == "blocks.0.attn.qkv.weight")
    assert formats == {"weight": "nvfp4/amax/16x16", "input": "nvfp4/amax", "grad": "nvfp4/amax",
                       "stochastic": ["grad", "weight_grad"], "hadamard": ["grad_weight"]}  # fmt: skip
    assert "finish" not in str(iso.plan(decoder(4), "u-mup", recipe="fp8"))
    site = next(site for site in plan.sites if site.path == "blocks.3.mlp.down")
    assert site.format == "bf16"


@pytest.mark.parametrize(("finish", "steps", "first"), [(0.0, 10, 10), (0.1, 10, 9), (0.25, 10, 7), (1.0, 10, 0), (0.04, 10, 10)])
def test_where_the_finish_begins(finish: float, steps: int, first: int) -> None:
    assert NVFP4.changed(finish=finish).finish_step(steps) == first


@pytest.mark.parametrize(("changes", "key"), [
    ({"keep": (1.5, 0.0)}, "keep_first"), ({"keep": (0.0, -0.1)}, "keep_last"), ({"finish": 2}, "finish"),
    ({"finish": True}, "finish"), ({"keep": ("a", 0.0)}, "keep_first"),
])  # fmt: skip
def test_shares_outside_of_0_to_1_are_refused(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe("mine", (), "", **changes)  # type: ignore[arg-type]
    assert caught.value.key == f"numerics.{key}"
    assert caught.value.hint
