"""FP8 by plain cast: what is cast, to what, that it really happened, and that a must-fail control fails."""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import isoscale as iso
from isoscale._base.errors import ConfigError, IsoscaleError, PlanError
from isoscale.formats.recipes import RECIPES, LayerFormats, Recipe, everywhere
from isoscale.models import Decoder, DecoderConfig
from isoscale.nn.engine import Engine
from isoscale.numerics import CastLinear, Linear, cast_stats, convert, summary


def decoder(**changes: object) -> Decoder:
    """Width 32, depth 2, planned with seed 0."""
    settings = {"vocab": 64, "width": 32, "depth": 2, "head_size": 16, **changes}
    model = Decoder(DecoderConfig(**settings))  # type: ignore[arg-type]
    iso.plan(model, "u-mup" if settings.get("scaling", "unit") == "unit" else "sp").apply(model)
    return model


IDS = torch.arange(96).view(4, 24) % 64


def record(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """Format -> the operands that every cast layer's matmuls saw."""
    seen: dict[str, list[Tensor]] = {}
    real = Engine.product

    def spy(self: Engine, which: int, left: Tensor, right: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
        for operand, fmt in zip((left, right), list(self.formats.passes.values())[which]):
            seen.setdefault(fmt, []).append(operand.detach().clone())
        return real(self, which, left, right, alpha, dtype)

    monkeypatch.setattr(Engine, "product", spy)
    model(IDS, IDS).backward()
    return seen


@pytest.mark.parametrize(("fmt", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2),
                                            ("bf16", ml_dtypes.bfloat16)])  # fmt: skip
def test_operands_lie_on_their_grid(fmt: str, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operand of every matmul is a value of its format: an outside oracle says so. fp32 operands do not pass."""
    seen = record(convert(decoder(), "fp8"), monkeypatch)
    assert set(seen) == {"e4m3", "e5m2", "bf16"}
    for operand in seen[fmt]:
        values = operand.numpy()
        assert np.array_equal(values.astype(dtype).astype(np.float32), values)
    off_grid = torch.randn(1000).numpy()
    assert not np.array_equal(off_grid.astype(dtype).astype(np.float32), off_grid)


def test_which_layers_get_what_is_visible() -> None:
    model = convert(decoder(), "fp8")
    found = summary(model)
    assert found.backend == "emulated"
    fp8 = {path for path, formats in found.layers.items() if formats.input == "e4m3"}
    assert fp8 == {f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("attn.qkv", "mlp.gate_up")}
    assert {path for path in found.layers if path not in fp8} == {
        "blocks.0.attn.out", "blocks.1.attn.out", "blocks.0.mlp.down", "blocks.1.mlp.down", "head"}  # fmt: skip
    shown = repr(model)
    assert "w e4m3, x e4m3, g e5m2, emulated" in shown
    forward = repr(convert(decoder(), "mxfp6-forward"))
    assert "w mxfp6_e3m2/floor, x mxfp6_e3m2/floor, g bf16; backward w bf16, x bf16, emulated" in forward
    assert "w bf16, x bf16, g bf16, emulated" in shown


def test_plan_rows_and_conversion_agree() -> None:
    model = Decoder(DecoderConfig(vocab=64, width=32, depth=2))
    plan = iso.plan(model, "u-mup", recipe="fp8")
    convert(model, "fp8", plan=plan)
    for path, formats in summary(model).layers.items():
        assert plan.row(f"{path}.weight").formats == formats
    assert {row.name for row in plan.rows} == {name for name, _ in model.named_parameters()}
    with pytest.raises(PlanError, match="made for the recipe 'fp8'"):
        convert(Decoder(DecoderConfig(vocab=64, width=32, depth=2)), "bf16", plan=plan)


@pytest.mark.parametrize("scaling", ["unit", "plain"])
def test_without_rounding_it_is_the_same_model(scaling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With casts that change nothing, values and gradients equal the unconverted model's."""
    left, right = decoder(scaling=scaling), decoder(scaling=scaling)
    convert(right, "mxfp8-bare")
    monkeypatch.setattr("isoscale.nn.engine.fake_cast", lambda x, fmt, axis: x)
    a, b = left(IDS, IDS), right(IDS, IDS)
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(left.named_parameters(), right.named_parameters()):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=2e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("scaling", ["unit", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_rounding_a_layer_with_everything_is_the_same(
    scaling: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bias, pending factor, residual add and readout multiplier: values and all five gradients."""
    monkeypatch.setattr("isoscale.nn.engine.fake_cast", lambda x, fmt, axis: x)
    torch.manual_seed(0)
    inner = iso.nn.LinearReadout(32, 48, bias=True, scaling=scaling)  # type: ignore[arg-type]
    inner.multiplier = 0.75
    nn.init.normal_(inner.bias)
    inner = inner.to(dtype)
    layer = CastLinear(inner, everywhere("mxfp8_e4m3"), "emulated")
    found = []
    for made in (inner, layer):
        draw = torch.Generator().manual_seed(1)
        x, skip = (torch.randn(2, 8, n, generator=draw).to(dtype).requires_grad_() for n in (32, 48))
        y = made(x, pending=1.5, skip=skip, branch_scale=0.6, skip_scale=0.8)
        grads = torch.autograd.grad(y, (x, skip, inner.weight, inner.bias), torch.randn(y.shape, generator=draw).to(dtype))
        found.append([y, *grads])
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-5
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("changes", [{"tied": True}, {"qk_norm": True, "norm": "trainable"}, {"kv_heads": 1}])
def test_decoder_variants_convert_and_train(changes: dict[str, object]) -> None:
    model = convert(decoder(**changes), "fp8")
    loss = model(IDS, IDS)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_mup_readout_multiplier_survives_conversion() -> None:
    model = decoder(scaling="plain", width=64)
    plan = iso.plan(model, "mup", base=iso.Scale(width=16), recipe="bf16", hps={"lr": 0.01})
    plan.apply(model)
    before = model(IDS)
    convert(model, "bf16", plan=plan)
    torch.testing.assert_close(model(IDS), before, rtol=0.05, atol=2e-3)
    assert model.head.multiplier == pytest.approx(0.25)


def test_torch_linears_of_a_foreign_model() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    before = model(torch.ones(3, 16))
    convert(model, "fp8-all")
    assert isinstance(model[0], CastLinear)
    after = model(torch.ones(3, 16))
    assert not torch.equal(before, after)
    torch.testing.assert_close(before, after, rtol=0.2, atol=0.1)


def test_gradients_pushed_out_of_range_vanish() -> None:
    """The control: at unit scale few gradients flush to zero; 2^-20 lower nearly all do.

    The gradients of Q and K are below unit scale by theory (about 1/sqrt(head size)), so qkv has a wider band.
    """
    model = convert(decoder(), "fp8")
    calm = cast_stats(model, lambda: model(IDS, IDS))
    low = cast_stats(model, lambda: model(IDS, IDS) * 2.0**-20)

    def flushed(rows: list[dict[str, object]], leaf: str) -> list[float]:
        return [float(r["flushed"]) for r in rows if r["operand"] == "grad" and str(r["layer"]).endswith(leaf)]  # type: ignore[arg-type]

    assert max(flushed(calm, "gate_up")) < 1e-3
    assert max(flushed(calm, "qkv")) < 0.03
    assert min(flushed(low, "gate_up") + flushed(low, "qkv")) > 0.5
    assert {r["operand"] for r in calm} == {"weight", "input", "grad"}
    assert all(p.grad is None for p in model.parameters())


def test_the_gap_is_not_zero_and_not_large() -> None:
    left, right = decoder(), convert(decoder(), "fp8")
    a, b = left(IDS, IDS).item(), right(IDS, IDS).item()
    assert a != b
    assert abs(a - b) < 0.02


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"none"}))
def test_compiles_to_the_same_values(recipe: str) -> None:
    torch._dynamo.reset()
    model = convert(decoder(depth=1), recipe)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS, IDS), model(IDS, IDS), rtol=1e-5, atol=1e-5)
    assert not any(layer.casts["weight"] > 1 for layer in model.modules() if isinstance(layer, CastLinear))


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"none"}))
def test_every_recipe_learns(recipe: str) -> None:
    """A few steps on one batch bring the loss down, in fp32 and under bf16 autocast."""
    for low in (False, True):
        model = Decoder(DecoderConfig(vocab=64, width=32, depth=1, head_size=16))
        plan = iso.plan(model, "u-mup", recipe=recipe, hps={"lr": 0.5})
        plan.apply(model)
        convert(model, recipe, plan=plan)
        optimizer = torch.optim.AdamW(plan.param_groups(model))
        losses = []
        for _ in range(6):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = model(IDS, IDS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.3, losses


def test_every_layer_casts_each_operand_once() -> None:
    """Six casts a step and layer with blocks; the BF16 head shares its casts between matmuls."""
    model = convert(decoder(), "mxfp8-bare")
    model(IDS, IDS).backward()
    layers = {path: m.casts for path, m in model.named_modules() if isinstance(m, CastLinear)}
    assert set(layers.pop("head")) == {"weight", "input", "grad"}
    for path, casts in layers.items():
        assert len(casts) == 6, path
        assert set(casts.values()) == {1}, path


def test_parameters_keep_names_and_copies_stay_equal() -> None:
    model = decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = copy.deepcopy(convert(model, "nvfp4-bare"))
    assert list(model.state_dict()) == list(before)
    assert torch.equal(twin(IDS, IDS), model(IDS, IDS))
    decoder().load_state_dict(model.state_dict())


def test_logged_casts_of_blocks_name_their_axis() -> None:
    model = convert(decoder(), "mxfp4-bare")
    rows = cast_stats(model, lambda: model(IDS, IDS))
    found = {(r["operand"], r["axis"]) for r in rows if r["layer"] == "blocks.0.mlp.down"}
    assert found == {("input", -1), ("weight", -1), ("grad", -1), ("backward_weight", -2), ("weight_grad", -2),
                     ("backward_input", -2)}  # fmt: skip
    assert {r["format"] for r in rows} == {"mxfp4/floor", "bf16"}
    by = {(r["layer"], r["operand"]): r for r in rows}
    forward, back = (by["blocks.0.mlp.down", name]["clipped"] for name in ("input", "backward_input"))
    assert forward != back  # other blocks of the same tensor
    assert 0 < forward < 0.2


def test_stands_in_for_the_layer_it_replaces() -> None:
    """The composite modules call leaves through one signature; the cast layer must have all of it."""
    import inspect

    from isoscale.nn import Linear, LinearReadout

    ours = inspect.signature(CastLinear.forward).parameters
    for kind in (Linear, LinearReadout):
        for name, parameter in inspect.signature(kind.forward).parameters.items():
            assert name in ours, name
            assert ours[name].default == parameter.default


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="unknown recipe"):
        convert(decoder(), "fp9")
    with pytest.raises(ConfigError, match="no FP8 matmul"):
        convert(decoder(), "fp8", backend="scaled_mm")
    with pytest.raises(ConfigError, match="unknown backend"):
        convert(decoder(), "fp8", backend="fast")
    with pytest.raises(PlanError, match="converted already"):
        convert(convert(decoder(), "fp8"), "fp8")
    with pytest.raises(PlanError, match="no linear layer"):
        convert(nn.Sequential(nn.ReLU()), "fp8")
    with pytest.raises(PlanError, match="lone linear"):
        convert(nn.Linear(2, 2), "fp8")
    with pytest.raises(ConfigError, match="no such norm") as caught:
        convert(decoder(), "mxfp8-bare", norm="mxnrom")
    assert "did you mean mxnorm" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        convert(model := decoder(), "mxfp8-bare", backend="scaled_mm")
    assert "blocks.0.attn.qkv: mxfp8 runs on CUDA devices" in caught.value.place
    assert not any(isinstance(module, CastLinear) for module in model.modules())  # left as it was
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(0, 4))
    with pytest.raises(PlanError, match="without features"):
        convert(empty, "fp8")
    assert convert(model := decoder(), "none") is model


@pytest.mark.gpu
def test_hardware_and_emulation_agree() -> None:
    model = convert(decoder(width=64).cuda(), "fp8", backend="emulated")
    twin = convert(decoder(width=64).cuda(), "fp8", backend="scaled_mm")
    ids = IDS.cuda()
    torch.testing.assert_close(model(ids), twin(ids), rtol=0.02, atol=0.02)


def test_what_a_user_may_get_wrong() -> None:
    plain = nn.Sequential(nn.Linear(64, 32))
    nothing = Recipe("mine", ((("nope.*",), LayerFormats("mxfp4", "mxfp4", "bf16")),), "matches no layer")
    for model, recipe, says in ((plain, nothing, "casts no layer"), (3, "fp8", "only a module"), (plain, None, "unknown recipe")):
        with pytest.raises(IsoscaleError, match=says):
            convert(model, recipe)  # type: ignore[type-var, arg-type]
    assert cast_stats(plain, lambda: torch.ones(())) == []  # nothing is cast, nothing is run
    own = nn.Sequential(Linear(64, 32, formats="mxfp4"), nn.Linear(32, 32))
    convert(own, "fp8")
    assert str(own[0].engine.formats) == "w mxfp4/floor, x mxfp4/floor, g mxfp4/floor"  # formats set by hand stay
    assert convert(nn.Sequential(nn.Linear(64, 32, device="meta")), "mxfp8-bare")(torch.empty(3, 64, device="meta")).is_meta
