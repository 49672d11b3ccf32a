"""`scalify` on whole models: equal to the plain model under float32, close to it in few bits, and what it refuses."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isoscale import scalify as sc
from isoscale._base import errors as sc_errors
from isoscale._base.errors import ConfigError
from isoscale.models import Decoder, DecoderConfig, ViT, ViTConfig


def decoder():
    model = Decoder(DecoderConfig(vocab=64, width=32, depth=2, head_size=16, scaling="plain", norm="trainable"))
    return model, lambda m, x: m(*x), tuple(torch.randint(64, (3, 24)) for _ in range(2))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    ids = torch.randint(64, (3, 24))
    return GPT2LMHeadModel(config), lambda m, x: m(input_ids=x, labels=x).loss, ids


def vit():
    model = ViT(ViTConfig(width=32, depth=2, head_size=16, norm="trainable", scaling="plain"))
    return model, lambda m, x: F.cross_entropy(m(x[0]), x[1]), (torch.randn(4, 1, 8, 8), torch.randint(10, (4,)))


def conv():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    return model, lambda m, x: F.cross_entropy(m(x[0]), x[1]), (torch.randn(4, 3, 10, 10), torch.randint(5, (4,)))


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(20, 12), nn.LSTM(12, 16, 2, batch_first=True), nn.Linear(16, 20)

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0])


def lstm():
    return Lstm(), lambda m, x: F.cross_entropy(m(x[0]).flatten(0, 1), x[1].flatten()), tuple(
        torch.randint(20, (3, 9)) for _ in range(2)
    )  # fmt: skip


MODELS = {"decoder": decoder, "gpt2": gpt2, "vit": vit, "conv": conv, "lstm": lstm}


def trained(model, loss, batch, optimizer, steps):
    losses = []
    for _ in range(steps):
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return losses


def sides(name, recipe, steps, lr=1e-3):
    torch.manual_seed(0)
    model, loss, batch = MODELS[name]()
    other = copy.deepcopy(model)
    plain = trained(model, loss, batch, torch.optim.AdamW(model.parameters(), lr=lr), steps)
    other, optimizer = sc.scalify(other, torch.optim.AdamW(other.parameters(), lr=lr), recipe)
    return plain, trained(other, loss, batch, optimizer, steps), other


@pytest.mark.parametrize("name", MODELS)
def test_under_float32_a_scaled_model_is_the_plain_one(name):
    plain, scaled, _ = sides(name, "float32", 6)
    assert max(abs(a - b) for a, b in zip(plain, scaled)) < 2e-5
    assert plain[-1] < plain[0] - 0.01  # it did learn
    half, _, _ = sides(name, "float32", 6, lr=2e-3)
    assert max(abs(a - b) for a, b in zip(half, scaled)) > 1e-4  # the control: another LR is seen


@pytest.mark.parametrize("recipe", ["fp16", "fp16-master", "fp16-fp16", "fp8", "fp8-fp16", "bf16-bf16"])
@pytest.mark.parametrize("name", ["decoder", "gpt2", "vit"])
def test_few_bits_stay_close(name, recipe):
    plain, scaled, model = sides(name, recipe, 6)
    assert abs(plain[-1] - scaled[-1]) < (0.05 if "fp8" in recipe or "bf16" in recipe else 0.01)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if "bf16" in recipe else torch.float16}


@pytest.mark.parametrize("name", ["conv", "lstm"])
def test_convolutions_and_recurrence_train_in_fp16(name):
    plain, scaled, _ = sides(name, "fp16-fp16", 6)
    assert abs(plain[-1] - scaled[-1]) < 0.01


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    return model, torch.randn(128, 64), torch.randint(10, (128,))


def test_adamw_over_sixty_steps_is_plain_to_round_off():
    model, x, y = mlp()
    other = copy.deepcopy(model)
    settings = {"lr": 3e-3, "weight_decay": 1e-2, "eps": 2.0**-24}

    def loss(m, batch):
        return F.cross_entropy(m(batch[0]), batch[1])

    plain = trained(model, loss, (x, y), torch.optim.AdamW(model.parameters(), **settings), 60)
    other, optimizer = sc.scalify(other, torch.optim.AdamW(other.parameters(), **settings), "float32")
    scaled = trained(other, loss, (x, y), optimizer, 60)
    assert max(abs(a - b) for a, b in zip(plain, scaled)) <= 5e-7
    assert plain[-1] < 0.5 * plain[0]


def test_a_loss_far_below_fp16_trains_where_plain_half_stands_still():
    def run(make):
        model, x, y = mlp()
        model, optimizer = make(model)
        half = next(model.parameters()).dtype
        for _ in range(40):
            (F.cross_entropy(model(x.to(half)), y) * 1e-6).backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(F.cross_entropy(model(x.to(half)), y).detach())

    scaled = run(lambda m: sc.scalify(m, torch.optim.SGD(m.parameters(), lr=5e4), "fp16"))
    plain = run(lambda m: (m, torch.optim.SGD(m.parameters(), lr=5e4)))
    half = run(lambda m: (m.half(), torch.optim.SGD(m.parameters(), lr=5e4)))
    assert abs(scaled - plain) < 0.01
    assert abs(half - plain) > 0.05  # the control


def test_tied_weights_stay_tied():
    model, loss, batch = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    model, optimizer = sc.scalify(model, torch.optim.AdamW(model.parameters(), lr=1e-3), "fp16")
    assert model.lm_head.weight is model.transformer.wte.weight
    count = len(list(model.parameters()))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == count
    trained(model, loss, batch, optimizer, 2)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_rescales_stand_at_the_norms_two_in_a_block():
    model, _, _ = gpt2()
    sc.scalify(model, None, sc.as_published("fp16"))
    placed = sc.placements(model)
    assert [path for path in placed if ".h.0." in path] == ["transformer.h.0.ln_1", "transformer.h.0.ln_2"]
    assert {step.direction for step in placed.values()} == {"backward"}
    bare, _, _ = gpt2()
    sc.scalify(bare, None, sc.as_published("fp16-master"))
    assert not sc.placements(bare)


def test_by_default_rescales_stand_at_linear_layers_too():
    model, _, _ = gpt2()
    sc.scalify(model, None, "fp8-fp16")
    block = {path.removeprefix("transformer.h.0."): step.direction for path, step in sc.placements(model).items()
             if ".h.0." in path}  # fmt: skip
    linears = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert block == {"ln_1": "backward", "ln_2": "backward", **dict.fromkeys(linears, "backward"),
                     **{f"{path} output": "forward" for path in linears}}  # fmt: skip


def test_rms_norm_is_one_operator_and_survives_data_whose_square_overflows_fp16():
    from isoscale.scalify import watch

    x = sc.as_scaled(torch.randn(4, 64) * 500, scale=1.0, dtype=torch.float16)
    weight = nn.Parameter(sc.as_scaled(torch.randn(64), dtype=torch.float16))
    x.requires_grad_()
    with watch() as seen:
        y = F.rms_norm(x, (64,), weight, 1e-5)
    assert [row.op for row in seen.rows] == ["isoscale.rms_norm.default"]
    plain, w = (sc.as_plain(t.detach(), torch.float32).requires_grad_() for t in (x, weight))
    want = F.rms_norm(plain, (64,), w, 1e-5)
    assert torch.allclose(sc.as_plain(y.detach(), torch.float32), want, atol=4e-3)
    g = torch.randn(4, 64)
    y.backward(sc.as_scaled(g, dtype=torch.float16))
    want.backward(g)
    for ours, theirs in ((x.grad, plain.grad), (weight.grad, w.grad)):
        assert (sc.as_plain(ours, torch.float32) - theirs).norm() < 4e-3 * theirs.norm()
    assert not torch.isfinite(x.detach().data_part.square()).all()  # the control


def test_groups_and_their_settings_come_along():
    model = nn.Linear(4, 4)
    old = torch.optim.SGD([{"params": [model.weight], "lr": 0.5, "name": "matrix"}, {"params": [model.bias]}],
                          lr=0.1, momentum=0.9, nesterov=True)  # fmt: skip
    model, new = sc.scalify(model, old, "fp16")
    assert isinstance(new, sc.ScaledSGD)
    assert [(g["lr"], g["momentum"], g["nesterov"]) for g in new.param_groups] == [(0.5, 0.9, True), (0.1, 0.9, True)]
    assert new.param_groups[0]["name"] == "matrix"
    assert new.param_groups[0]["params"][0] is model.weight
    torch.optim.lr_scheduler.StepLR(new, 1)


def test_adam_keeps_its_coupled_decay():
    model = nn.Linear(4, 4)
    for kind, decoupled in ((torch.optim.Adam, False), (torch.optim.AdamW, True)):
        _, new = sc.scalify(copy.deepcopy(model), None, "fp16")
        other = copy.deepcopy(model)
        _, new = sc.scalify(other, kind(other.parameters(), weight_decay=0.1), "fp16")
        assert new.param_groups[0]["decoupled"] is decoupled


def test_a_plain_checkpoint_goes_in_and_comes_out():
    source = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    with torch.no_grad():
        source[0].weight.mul_(1e-7)  # plain fp16 would lose it
    model, _ = sc.scalify(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)), None, "fp16")
    model.load_state_dict(source.state_dict())
    for name, x in sc.plain_state(model.state_dict()).items():
        assert torch.allclose(x, source.state_dict()[name], rtol=1e-3, atol=0)
    back = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    back.load_state_dict(sc.plain_state(model.state_dict()))
    assert back[0].weight.dtype == torch.float32


def test_state_goes_through_safetensors(tmp_path):
    model, _ = sc.scalify(nn.Linear(6, 5), None, "fp16")
    sc.save_state(model.state_dict(), tmp_path / "m.safetensors")
    from safetensors.torch import load_file

    assert sorted(load_file(tmp_path / "m.safetensors")) == ["bias", "bias.scale", "weight", "weight.scale"]
    other, _ = sc.scalify(nn.Linear(6, 5), None, "fp16")
    other.load_state_dict(sc.load_state(tmp_path / "m.safetensors"))
    assert torch.equal(other.weight.data_part, model.weight.data_part)
    assert torch.equal(other.weight.scale, model.weight.scale)
    with pytest.raises(Exception, match="no such file"):
        sc.load_state(tmp_path / "other.safetensors")


def test_a_scaled_model_is_copied_and_pickled():
    model, _ = sc.scalify(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)), None, "fp16")
    x = torch.randn(2, 6)
    want = sc.as_plain(model(x).detach())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(sc.as_plain(other(x).detach()), want)


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    model, x, y = mlp()
    model, _ = sc.scalify(model, None, "fp16")
    F.cross_entropy(model(x), y).backward()
    want = [sc.as_plain(p.grad) for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(checkpoint(model, x, use_reentrant=False), y).backward()
    for p, grad in zip(model.parameters(), want):
        assert torch.equal(sc.as_plain(p.grad), grad)


def stepped(model):
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return optimizer


def scheduled(model):
    optimizer = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: torch.optim.RMSprop(m.parameters()), "no scaled form"),
        (stepped, "stepped already"),
        (scheduled, "has a schedule"),
        (lambda m: torch.optim.AdamW(nn.Linear(4, 4).parameters()), "that the model does not"),
        (lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True), "amsgrad"),
    ],
)
def test_optimisers_that_cannot_be_scaled_are_refused_and_the_model_is_left_alone(make, message):
    model = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=message):
        sc.scalify(model, make(model), "fp16")
    assert not any(isinstance(p, sc.ScaledTensor) for p in model.parameters())


def test_a_second_scalify_and_unknown_names_are_refused():
    model, _ = sc.scalify(nn.Linear(4, 4), None, "fp16")
    with pytest.raises(ConfigError, match="scaled already"):
        sc.scalify(model)
    with pytest.raises(ConfigError, match="no such recipe") as caught:
        sc.scalify(nn.Linear(4, 4), None, "fp16-fp61")
    assert "fp16-fp16" in str(caught.value)
    for settings in ({"dtype": "fp12"}, {"state": "int8"}, {"norm_rescale": "l5"}, {"period": 0}, {"colour": 1}):
        with pytest.raises(ConfigError):
            sc.RECIPES["fp16"].changed(**settings)


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.randn(4))
        self.register_buffer("huge", torch.tensor([1e6, 1.0]))
        self.register_buffer("tiny", torch.tensor([1e-9, 1.0]))
        self.register_buffer("inv_freq", torch.randn(4))


def test_buffers_that_fp16_cannot_hold_stay_and_are_named():
    model = Buffers()
    want = {name: x.clone() for name, x in model.named_buffers()}
    with pytest.warns(UserWarning, match="cannot hold its values") as caught:
        sc.scalify(model, None, "fp16")
    assert {str(w.message).split("'")[1] for w in caught} == {"huge", "tiny"}
    kinds = {name: x.dtype for name, x in model.named_buffers() if name in want}
    assert kinds == {"table": torch.float16, "huge": torch.float32, "tiny": torch.float32, "inv_freq": torch.float32}
    for name in ("huge", "tiny", "inv_freq"):
        assert torch.equal(getattr(model, name), want[name])


def test_an_optimiser_is_copied_and_pickled_with_its_settings_and_goes_on():
    model = nn.Linear(4, 4)
    model, optimizer = sc.scalify(model, torch.optim.AdamW(model.parameters(), lr=0.1), "fp16-fp16", seed=5)
    x = torch.randn(3, 4)
    trained(model, lambda m, b: m(b).square().mean(), x, optimizer, 2)
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    want = trained(model, lambda m, b: m(b).square().mean(), x, optimizer, 3)
    for other, its in pairs:
        assert its.seed == 5
        assert trained(other, lambda m, b: m(b).square().mean(), x, its, 3) == want


def test_the_state_of_a_plain_optimiser_is_refused():
    model = nn.Linear(4, 4)
    plain = stepped(model)
    model, _ = sc.scalify(copy.deepcopy(model), None, "fp16")
    optimizer = sc.ScaledAdamW(model.parameters())
    with pytest.raises(sc_errors.CheckpointError, match="another optimiser"):
        optimizer.load_state_dict(plain.state_dict())


def test_values_of_scaled_tensors_by_either_name():
    x = torch.randn(6, 4) * 1e-3
    scaled = sc.as_scaled(x, dtype=torch.float16)
    assert torch.equal(sc.value(scaled, torch.float32), sc.as_plain(scaled, torch.float32))
    assert torch.equal(sc.value(x), x)


def test_save_state_refuses_what_is_no_model_state(tmp_path):
    with pytest.raises(sc_errors.CheckpointError, match="holds tensors"):
        sc.save_state({"state": {}}, tmp_path / "o.safetensors")
