"""`convert(norm="mxnorm")`: pairs found, models kept whole, what is no pair refused by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isoscale as iso
from isoscale._base.errors import ConfigError, PlanError
from isoscale.models import Decoder, DecoderConfig
from isoscale.nn import MXNormLinear
from isoscale.nn.mxnorm_linear import MXNormGain
from isoscale.numerics import CastLinear, convert, find_pairs, fold, summary, switch

IDS = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))


def decoder(**settings: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**{"vocab": 100, "width": 64, "depth": 2, **settings}))


def llama(kind: str = "Llama", **more: Any) -> nn.Module:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    model: nn.Module = getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**{**sizes, **more}))
    return model


def gpt2(rms: bool) -> nn.Module:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=1)
    model: nn.Module = hf.GPT2LMHeadModel(config)
    if rms:
        for block in model.transformer.h:  # type: ignore[union-attr]
            block.ln_1, block.ln_2 = nn.RMSNorm(64, 1e-5), nn.RMSNorm(64, 1e-5)
    return model.eval()


def vit(rms: bool) -> nn.Module:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                          image_size=16, patch_size=4, num_labels=7)  # fmt: skip
    model: nn.Module = hf.ViTForImageClassification(config)
    for path, module in list(model.named_modules()):
        if rms and isinstance(module, nn.LayerNorm) and "layers." in path:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.RMSNorm(64, 1e-5))
    return model.eval()


def mxnorm_layers(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, MXNormLinear)]


@pytest.mark.parametrize("settings", [{}, {"scaling": "plain"}, {"norm": "trainable"}, {"qk_norm": True, "kv_heads": 2}])
def test_the_decoder(settings: dict[str, Any]) -> None:
    model, plain = decoder(**settings), decoder(**settings)
    names = list(model.state_dict())
    assert convert(model, "mxfp8", norm="mxnorm") is model
    assert mxnorm_layers(model) == [f"blocks.{i}.{at}" for i in (0, 1) for at in ("attn.qkv", "mlp.gate_up")]
    assert list(model.state_dict()) == names
    assert isinstance(model.norm, iso.nn.RMSNorm), "the final norm stays"
    assert isinstance(model.head, CastLinear)
    assert not isinstance(model.head, MXNormLinear)
    loss, want = model(IDS, IDS), plain(IDS, IDS)
    assert loss.item() != want.item()
    assert loss.item() == pytest.approx(want.item(), abs=0.2)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_llama_shaped_models(kind: str) -> None:
    model, plain = llama(kind), llama(kind)
    names = list(model.state_dict())
    convert(model, "mxfp8", norm="mxnorm")
    assert len(mxnorm_layers(model)) == 10  # q, k, v, gate, up in two layers
    assert list(model.state_dict()) == names
    assert type(model.model.norm).__name__ == f"{kind}RMSNorm"  # type: ignore[union-attr]
    got, want = model(IDS).logits, plain(IDS).logits
    assert 0 < float((got - want).norm() / want.norm()) < 0.25
    got.float().square().mean().backward()
    gains = [p for name, p in model.named_parameters() if "layernorm" in name]
    assert len(gains) == 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gains)


@pytest.mark.parametrize("make", [gpt2, vit])
def test_gpt2_and_vit_with_rmsnorm(make: Any) -> None:
    model, plain = make(True), make(True)
    convert(model, "mxfp8", norm="mxnorm", norm_skip="transformer.ln_f" if make is gpt2 else ("vit.layernorm",))
    assert len(mxnorm_layers(model)) == (4 if make is gpt2 else 8)
    inputs = IDS if make is gpt2 else torch.randn(2, 3, 16, 16)
    got, want = model(inputs).logits, plain(inputs).logits
    assert 0 < float((got - want).detach().norm() / want.detach().norm()) < 0.25


@pytest.mark.parametrize(("make", "name"), [(gpt2, "transformer.h.0.ln_1"), (vit, "vit.layers.0.layernorm_before")])
def test_layernorm_is_refused_by_name(make: Any, name: str) -> None:
    model = make(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=f"{name}.*LayerNorm subtracts the mean") as told:
        convert(model, "mxfp8", norm="mxnorm")
    assert "norm_skip" in str(told.value)
    assert not any(isinstance(module, CastLinear) for module in model.modules()), "a refusal changes nothing"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Biased(nn.RMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size, 1e-5)
        self.bias = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class OddNorm(nn.Module):
    """An RMSNorm by name only."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


class Toy(nn.Module):
    """Norm, two linears, and what is done with the norm's output besides."""

    def __init__(self, norm: nn.Module, how: str = "") -> None:
        super().__init__()
        self.norm, self.how = norm, how
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.how == "residual":
            return self.head(h + self.a(h) * self.b(h))
        if self.how == "view":
            return self.head(self.a(h.view(-1, 64)) + self.b(h))
        if self.how == "to head":
            return self.head(self.a(h)) + self.head(h)
        if self.how == "function":
            return self.head(self.a(nn.functional.linear(h, self.b.weight)))
        if self.how == "training":
            return self.head(self.a(h) + (h * 0.1 if self.training else 0))
        if self.how == "hidden":
            with torch._C.DisableTorchFunction():  # as compiled extensions do
                twice = h * 2
            return self.head(self.a(h) + self.b(twice))
        return self.head(self.a(h) * self.b(h))


X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


def test_a_norm_that_feeds_two_linear_layers_is_a_pair() -> None:
    model = Toy(nn.RMSNorm(64, 1e-5))
    (pair,) = find_pairs(model, X).pairs
    assert (pair.norm, pair.linears) == ("norm", ("a", "b"))
    convert(model, "mxfp8", norm="mxnorm")
    assert mxnorm_layers(model) == ["a", "b"]
    assert model.a._norm[0] is model.norm is model.b._norm[0]
    model(X).sum().backward()
    assert model.norm.weight.grad is not None


def test_views_between_norm_and_linear_are_followed() -> None:
    assert find_pairs(Toy(nn.RMSNorm(64, 1e-5), "view"), X).pairs[0].linears == ("a", "b")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Toy(nn.RMSNorm(64, 1e-5), "residual"), "norm: its output also goes to add"),
        (lambda: Toy(nn.RMSNorm(64, 1e-5), "to head"), "norm: its output also goes to head, which the recipe casts to no"),
        (lambda: Toy(Biased(64)), "norm: Biased adds a bias"),
        (lambda: Toy(nn.LayerNorm(64)), "norm: LayerNorm subtracts the mean"),
        (lambda: Toy(nn.LayerNorm(64, bias=False)), "norm: LayerNorm subtracts the mean"),
        (lambda: Toy(OddNorm(64)), "norm: OddNorm does not compute"),
        (lambda: Toy(nn.RMSNorm(64, 1e-5), "hidden"), "in a way that was not seen"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_refused_with_the_reason(model: Any, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        convert(model(), "mxfp8", norm="mxnorm", example=X)


def test_a_gain_of_one_plus_weight_is_refused() -> None:
    with pytest.raises(PlanError, match="the gain of GemmaRMSNorm is 1 \\+ weight"):
        convert(llama("Gemma", head_dim=16), "mxfp8", norm="mxnorm")


def test_other_refusals() -> None:
    with pytest.raises(ConfigError, match="mxnorm") as told:
        convert(decoder(), "mxfp8", norm="mxnrom")
    assert "did you mean mxnorm" in str(told.value)
    with pytest.raises(PlanError, match="no norm that MXNorm could take over"):
        convert(Toy(nn.Identity()), "mxfp8", norm="mxnorm", example=X)
    for recipe in ("none", "bf16", "fp8-all", "fp8-dynamic"):
        with pytest.raises(ConfigError, match="needs inputs cast in blocks"):
            convert(decoder(), recipe, norm="mxnorm")
    with pytest.raises(PlanError, match="no norm has such a name"):
        convert(decoder(), "mxfp8", norm="mxnorm", norm_skip="blocks.*.nrom")
    with pytest.raises(PlanError, match="a compiled model"):
        convert(torch.compile(decoder(), backend="eager"), "mxfp8", norm="mxnorm")
    with pytest.raises(PlanError, match="example"):
        convert(nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 64)), "mxfp8", norm="mxnorm", example={"z": X})
    with pytest.raises(PlanError, match="no MXNormLinear"):
        fold(decoder())


def test_a_plan_refuses_what_convert_would() -> None:
    from isoscale.config import RunConfig
    from isoscale.formats.recipes import NORMS, recipe_by_name
    from isoscale.train.setup import meta_plan

    assert tuple(iso.numerics.NORMS) == NORMS
    with pytest.raises(ConfigError, match="needs inputs cast in blocks"):
        meta_plan(RunConfig().with_values(**{"numerics.recipe": "fp8", "numerics.norm": "mxnorm"}))
    with pytest.raises(ConfigError, match="no such norm"):
        recipe_by_name("mxfp8").changed(norm="mxnrm")


def test_what_is_left_alone_is_told() -> None:
    found = find_pairs(decoder(), casts=lambda path: path != "head")
    assert found.left == {"norm": "its output goes to no block-scaled linear layer, but to head"}
    with pytest.raises(PlanError, match="norm: its output goes to no block-scaled linear layer, but to linear"):
        convert(Toy(nn.RMSNorm(64, 1e-5), "function"), "mxfp8", norm="mxnorm", example=X)


def test_a_use_in_training_alone_is_seen() -> None:
    model = Toy(nn.RMSNorm(64, 1e-5), "training").eval()
    with pytest.raises(PlanError, match="norm: its output also goes to mul"):
        convert(model, "mxfp8", norm="mxnorm", example=X)
    assert not model.training


def test_buffers_stay_as_they_were() -> None:
    model = nn.Sequential(nn.BatchNorm1d(64), nn.RMSNorm(64, 1e-5), nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert len(find_pairs(model, X).pairs) == 1
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_skipped_norms_stay() -> None:
    model = decoder()
    convert(model, "mxfp8", norm="mxnorm", norm_skip=("blocks.0.*",))
    assert mxnorm_layers(model) == ["blocks.1.attn.qkv", "blocks.1.mlp.gate_up"]
    assert isinstance(model.blocks[0].attn_norm, iso.nn.RMSNorm)  # type: ignore[union-attr]


def test_blocks_kept_in_bf16_keep_their_norms() -> None:
    model = decoder(depth=8)
    convert(model, "nvfp4", norm="mxnorm")
    assert {path.split(".")[1] for path in mxnorm_layers(model)} == {str(i) for i in range(7)}
    assert isinstance(model.blocks[7].attn_norm, iso.nn.RMSNorm)  # type: ignore[union-attr]
    assert model(IDS, IDS).isfinite()


@pytest.mark.parametrize("norm", ["mxnorm", "mxnorm-fine", "mxnorm-p1", "mxnorm-ride", "mxnorm-rounded"])
def test_every_norm_by_name(norm: str) -> None:
    model = decoder(width=128)
    convert(model, "mxfp8", norm=norm)
    layer = model.blocks[0].attn.qkv  # type: ignore[union-attr]
    assert isinstance(layer, MXNormLinear)
    assert layer.estimator.p == (1 if norm in ("mxnorm-p1", "mxnorm-rounded") else 2)
    assert layer.estimator.block == (8 if norm == "mxnorm-fine" else 32)
    assert layer.ride == (norm == "mxnorm-ride")
    assert layer.estimator.estimate == ("rounded" if norm == "mxnorm-rounded" else "raw")
    assert model(IDS, IDS).item() == pytest.approx(decoder(width=128)(IDS, IDS).item(), abs=0.2)


def test_with_a_plan() -> None:
    model = decoder()
    plan = iso.plan(model, "u-mup", hps={"lr": 1.0}, recipe="mxfp8")
    plan.apply(model)
    convert(model, "mxfp8", plan=plan, norm="mxnorm")
    assert summary(model).layers["blocks.0.attn.qkv"] == plan.row("blocks.0.attn.qkv.weight").formats
    optimizer = torch.optim.AdamW(plan.param_groups(model))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(IDS, IDS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_probes_see_what_the_norm_would_give() -> None:
    model, plain = decoder(norm="trainable"), decoder(norm="trainable")
    convert(model, "mxfp8", norm="mxnorm")
    seen: dict[str, float] = {}
    for name, one in (("mx", model), ("plain", plain)):
        one(IDS, probe=lambda path, port, value, factor, name=name: seen.__setitem__(
            f"{name} {path}", float(value.detach().square().mean().sqrt()) * factor))  # fmt: skip
    assert seen["mx blocks.0.attn_norm"] == pytest.approx(seen["plain blocks.0.attn_norm"], rel=1e-5)
    assert seen["mx blocks.1.mlp_norm"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("make", [lambda: decoder(norm="trainable"), llama])
def test_folding_gains_for_inference(make: Any) -> None:
    model = make().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    convert(model, "mxfp8", norm="mxnorm")
    with torch.no_grad():
        out = model(IDS)
        want = out if isinstance(out, Tensor) else out.logits
        assert fold(model) is model
        out = model(IDS)
    torch.testing.assert_close(out if isinstance(out, Tensor) else out.logits, want, rtol=1e-6, atol=1e-6)
    gains = [module.weight for module in model.modules() if isinstance(module, MXNormGain)]
    assert len(gains) == 4
    assert all(gain is not None and gain.eq(1).all() for gain in gains)
    plain = make().eval()
    plain.load_state_dict(model.state_dict())  # names and meaning stay
    with torch.no_grad():
        out = plain(IDS)
    exact = out if isinstance(out, Tensor) else out.logits
    assert float((exact - want).norm() / want.norm()) < 0.25


def test_the_norm_is_done_once_and_recorded_as_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    from isoscale.kernels import cpu_norm
    from isoscale.nn.mxnorm_estimate import Estimator

    if not cpu_norm.available():
        pytest.skip(cpu_norm.why_not())
    model = decoder()
    convert(model, "mxfp8", norm="mxnorm")
    stats = {(row["layer"], row["operand"]): row for row in iso.numerics.cast_stats(model, lambda: model(IDS, IDS))}
    assert stats["blocks.0.attn.qkv", "input"]["rms"] == pytest.approx(1.0, abs=0.15)  # x / r, not x
    layer = model.blocks[0].attn.qkv  # type: ignore[union-attr]
    before = layer.casts["input"]
    with monkeypatch.context() as patch:
        patch.setattr(Estimator, "rms", lambda self, x: pytest.fail("r is the kernel's, and nobody records"))
        model(IDS)
    assert layer.casts["input"] == before + 1


def test_copies_train_modes_and_switches() -> None:
    model = decoder(norm="trainable").eval()
    convert(model, "nvfp4", norm="mxnorm")
    assert not any(module.training for module in model.modules())
    want = model(IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), want)
        layer = twin.blocks[0].attn.qkv
        assert layer._norm[0] is twin.blocks[0].attn_norm
        assert layer._norm[0] is not model.blocks[0].attn_norm  # type: ignore[union-attr]
    switch(model, "bf16")
    assert float((model(IDS) - want).detach().norm() / want.detach().norm()) > 1e-3
    switch(model, "nvfp4")
    assert torch.equal(model(IDS), want)


def test_the_model_is_left_as_it_was_by_the_search() -> None:
    model = decoder().train()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    find_pairs(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert "split" not in model.blocks[0].attn_norm.__dict__  # type: ignore[union-attr]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
def test_a_compiled_model_gives_the_same() -> None:
    model = decoder()
    convert(model, "mxfp8", norm="mxnorm")
    want = model(IDS, IDS)
    want.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = torch.compile(model, fullgraph=True)(IDS, IDS)
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert float((p.grad - grads[name]).norm() / grads[name].norm()) < 0.1, name  # a code may flip at a tie


def test_the_recipe_and_the_plan_carry_the_norm() -> None:
    from isoscale.config import RunConfig
    from isoscale.formats.recipes import recipe_by_name
    from isoscale.planning import Plan
    from isoscale.train.setup import meta_plan

    recipe = recipe_by_name("mxfp8").changed(norm="mxnorm")
    model = decoder()
    plan = iso.plan(model, "u-mup", hps={"lr": 1.0}, recipe=recipe)
    assert "norm: mxnorm" in str(plan)
    assert Plan.from_json(plan.to_json()).norm == "mxnorm"
    convert(model, recipe, plan=plan)
    assert len(mxnorm_layers(model)) == 4
    assert not mxnorm_layers(convert(decoder(), recipe, norm="none"))
    config = RunConfig().with_values(**{"numerics.recipe": "mxfp8", "numerics.norm": "mxnorm-fine"})
    assert meta_plan(config).norm == "mxnorm-fine"
    assert "norm:" not in str(meta_plan(RunConfig()))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_sharded_model_gives_the_same() -> None:
    """The gain is a Parameter of the norm's place, read by layers elsewhere in the block: sharding must not lose it."""
    from torch.distributed.fsdp import fully_shard

    plain, sharded = (convert(decoder(norm="trainable"), "mxfp8", norm="mxnorm") for _ in range(2))
    for block in sharded.blocks:
        fully_shard(block)  # type: ignore[arg-type]
    fully_shard(sharded)
    for model in (plain, sharded):
        model(IDS, IDS).backward()
    for (name, one), two in zip(plain.named_parameters(), sharded.parameters()):
        assert one.grad is not None
        assert torch.equal(two.grad.full_tensor(), one.grad), name  # type: ignore[union-attr]
