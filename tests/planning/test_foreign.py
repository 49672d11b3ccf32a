"""Plans for models that isoscale did not make: numbers, no surgery, identity at base, what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_models import bert, gpt2, llama, mamba, mixtral, nanogpt, qwen3, resnet
from torch import Tensor, nn

import isoscale as iso
from isoscale._base.errors import PlanError

HPS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-7}
Make = Callable[..., nn.Module]
TEXT: list[Make] = [llama, gpt2, qwen3, mamba, nanogpt]


def seeded(make: Make, width: int, depth: int, seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return make(width, depth, **changes).eval()


def planned(make: Make, model: nn.Module, **said: Any) -> iso.Plan:
    """A plan for a model tuned at width 64, depth 2."""
    return iso.plan(model, "complete-d", base=seeded(make, 64, 2, 1), hps=HPS, **said)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return out if isinstance(out, Tensor) else getattr(out, "logits", out[0] if isinstance(out, tuple) else None)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[Tensor]:
    """Logits of every step."""
    draw = torch.Generator().manual_seed(3)
    out = []
    for _ in range(steps):
        ids = torch.randint(256, (3, 12), generator=draw)
        now = logits(model, ids)
        out.append(now.detach())
        loss = nn.functional.cross_entropy(now[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return out


def apart(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right))


def run(make: Make, optimizer: str, absorb: bool, **broken: float) -> list[Tensor]:
    model = seeded(make, 96, 3).double()
    plan = planned(make, model, absorb=absorb, optimizer=optimizer)
    plan.apply(model)
    groups = plan.param_groups(model)
    for group in groups:
        group.update({key: value for key, value in broken.items() if key in group})
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    return train(model, kind(groups))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("make", [llama, gpt2, nanogpt])
def test_absorbed_multipliers_train_the_same_model_as_hooks(make: Make, optimizer: str) -> None:
    ours, hooked = run(make, optimizer, True), run(make, optimizer, False)
    assert apart(ours[:1], ours[-1:]) > 1e-4  # it learns something
    assert apart(ours, hooked) < 1e-10


def test_control_one_eps_for_all_groups_is_another_training() -> None:
    assert apart(run(llama, "adamw", True, eps=1e-4), run(llama, "adamw", False, eps=1e-4)) > 1e-5


@pytest.mark.parametrize("make", [llama, gpt2, mixtral, mamba, bert, nanogpt, resnet])
def test_identity_at_base(make: Make) -> None:
    """base = target: weights, the user's own groups and logits bit for bit."""
    model = seeded(make, 64, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "lr": 3e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "name": "decay"},
              {"params": plain, "lr": 3e-4, "weight_decay": 0.0, "betas": (0.9, 0.95)}]  # fmt: skip
    plan = iso.plan(model, "complete-d", base=model, hps=HPS)
    plan.apply(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    back = plan.param_groups(model, groups)
    assert [{k: v for k, v in g.items() if k != "params"} for g in back] == [
        {k: v for k, v in g.items() if k != "params"} for g in groups
    ]
    assert all(p is q for g, h in zip(back, groups) for p, q in zip(g["params"], h["params"]))
    assert len(plan.param_groups(model)) == 1


def test_a_users_groups_are_kept_and_scaled() -> None:
    model = seeded(llama, 128, 4)
    plan = planned(llama, model)
    names = dict(model.named_parameters())
    slow = [p for n, p in names.items() if "mlp" in n]
    rest = [p for n, p in names.items() if "mlp" not in n]
    made = plan.param_groups(model, [{"params": slow, "lr": 1e-4, "eps": 1e-8, "kind": "slow", "weight_decay": 0.0},
                                     {"params": rest, "lr": 1e-3, "weight_decay": 0.2}])  # fmt: skip
    rates = {id(p): group for group in made for p in group["params"]}
    row = plan.row("model.layers.0.mlp.up_proj.weight")
    group = rates[id(names[row.name])]
    assert group["lr"] == pytest.approx(1e-4 * row.relative.lr)
    assert group["eps"] == pytest.approx(1e-8 * row.relative.eps)
    assert group["kind"] == "slow"
    assert group["weight_decay"] == 0
    head = rates[id(names["lm_head.weight"])]
    assert (head["lr"], head["weight_decay"]) == pytest.approx((5e-4, 0.4))
    with pytest.raises(PlanError, match="leave out"):
        plan.param_groups(model, [{"params": slow, "lr": 1.0, "weight_decay": 0.0}])
    with pytest.raises(PlanError, match="in two groups"):
        plan.param_groups(model, [{"params": [*slow, *rest, slow[0]], "lr": 1.0, "weight_decay": 0.0}])
    with pytest.raises(PlanError, match="does not know"):
        plan.param_groups(model, [{"params": [nn.Parameter(torch.zeros(2))], "lr": 1.0}])
    for missing in ("lr", "weight_decay"):
        whole = {"params": [*slow, *rest], "lr": 1e-3, "weight_decay": 0.1}
        del whole[missing]
        with pytest.raises(PlanError, match=f"has no {missing}, and an optimiser's default cannot be scaled"):
            plan.param_groups(model, [whole])
    for wrong in (model.parameters(), {"params": slow}, [slow]):
        with pytest.raises(PlanError, match="groups is a list of dicts"):
            plan.param_groups(model, wrong)  # type: ignore[arg-type]


def test_own_groups_split_between_two_optimisers() -> None:
    model = seeded(llama, 128, 4)
    plan = planned(llama, model, optimizer="muon")
    groups = [{"params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}]
    parts = {part: {id(p) for g in plan.param_groups(model, groups, part=part) for p in g["params"]}
             for part in ("muon", "adamw")}  # fmt: skip
    assert not parts["muon"] & parts["adamw"]
    assert len(parts["muon"]) + len(parts["adamw"]) == len(plan.rows)
    assert len(parts["muon"]) == 7 * 4


def test_trained_or_empty_weights_are_not_rescaled() -> None:
    model = seeded(llama, 128, 4)
    plan = planned(llama, model)
    plan.apply(model)
    train(model, torch.optim.AdamW(plan.param_groups(model)), 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(PlanError, match="not the values that the model starts with") as caught:
        plan.apply(model)
    assert "init=False" in caught.value.hint
    with pytest.raises(PlanError, match="not the values that the model starts with"):
        planned(llama, model).apply(model)
    plan.apply(model, init=False)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    for value in (0.0, float("nan")):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        with pytest.raises(PlanError, match="not the values that the model starts with"):
            plan.apply(model)


def test_an_update_keeps_its_place_in_the_schedule() -> None:
    model = seeded(llama, 128, 2)
    run = {"base_run": iso.Scale(batch_tokens=64, tokens=640), "target": iso.Scale(batch_tokens=64, tokens=640)}
    plan = planned(llama, model, **run)
    optimizer = torch.optim.AdamW(plan.param_groups(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    peak = optimizer.param_groups[0]["initial_lr"]
    plan.at(batch_tokens=256).update(optimizer, model, scheduler)
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["lr"]) == pytest.approx((2 * peak, 2 * peak * 0.5))
    optimizer.step()
    scheduler.step()
    assert group["lr"] == pytest.approx(2 * peak * 0.6)
    with pytest.raises(PlanError, match="trains other parameters"):
        plan.update(optimizer, copy.deepcopy(model))


def test_initial_values_are_the_models_own_scaled() -> None:
    model = seeded(gpt2, 128, 8)
    own = {name: float(p.detach().std()) for name, p in model.named_parameters()}
    draw = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = planned(gpt2, model)
    plan.apply(model)
    now = dict(model.named_parameters())
    name = "transformer.h.0.mlp.c_proj.weight"  # GPT-2 starts these at 0.02 / sqrt(2 layers)
    want = 0.02 / math.sqrt(4) / math.sqrt(2) / 4  # the base's, fan-in doubled, branch factor 2 / 8
    assert plan.row(name).init_std == pytest.approx(want)
    assert float(now[name].detach().std()) == pytest.approx(want, rel=0.02)
    torch.testing.assert_close(now[name] / want, draw[name] / own[name], rtol=0.02, atol=1e-3)
    assert torch.equal(now["transformer.wpe.weight"], draw["transformer.wpe.weight"])
    once = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan.apply(model)
    assert all(torch.equal(once[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("law", ["torch", "constant", "zero"])
def test_the_law_of_an_init_is_read(law: str) -> None:
    """torch's default shrinks with fan-in: nothing is left to do for hidden weights; a constant one is scaled."""

    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 4, bias=False)
            for layer in (self.a, self.b, self.c):
                if law == "constant":
                    nn.init.normal_(layer.weight, std=0.05)
            if law == "zero":
                nn.init.zeros_(self.c.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    model, base = Net(256), Net(64)
    before = model.b.weight.detach().clone()
    plan = iso.plan(model, "complete-d", base=base, hps=HPS)
    plan.apply(model)
    if law == "constant":
        torch.testing.assert_close(model.b.weight, before / 2)
    else:
        assert torch.equal(model.b.weight, before)
    if law == "zero":
        assert not model.c.weight.any()
    else:
        base_std = 0.05 if law == "constant" else (3 * 64) ** -0.5
        assert plan.row("c.weight").init_std == pytest.approx(base_std / 4)


def test_a_tied_readout_takes_its_factor_from_the_final_norm() -> None:
    model = seeded(gpt2, 128, 2)
    plan = planned(gpt2, model)
    assert plan.row("transformer.wte.weight").relative.lr == 1  # the embedding's row
    gain = plan.row("transformer.ln_f.weight")
    assert gain.init_value == pytest.approx(0.5)
    assert gain.relative.lr == pytest.approx(0.5)
    ids = torch.randint(256, (2, 8))
    before = logits(model, ids)
    hidden = {row.name for row in plan.rows if row.role == "hidden"}
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan.apply(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in hidden:
                parameter.copy_(kept[name])
    torch.testing.assert_close(logits(model, ids), before / 2, rtol=1e-4, atol=1e-6)


def test_router_and_experts_and_grouped_keys() -> None:
    model = seeded(mixtral, 128, 2)
    roles = iso.infer_roles(model, seeded(mixtral, 64, 2))
    assert {roles[n] for n in roles if ".gate.weight" in n} == {"router"}
    plan = planned(mixtral, model)
    assert plan.row("model.layers.0.mlp.experts.down_proj").fan_in == 2 * 128
    assert plan.row("model.layers.0.mlp.experts.down_proj").relative.lr == pytest.approx(0.5)




class Attend(nn.Module):
    """A block whose head size is its width, with the scale in an attribute or in the code."""

    def __init__(self, width: int, attribute: bool) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(64, width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.out = nn.Linear(width, 64, bias=False)
        if attribute:
            self.scale = width**-0.5

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h = self.norm(x)
        scale = getattr(self, "scale", None) or h.shape[-1] ** -0.5
        weights = (self.q(h) @ self.k(h).transpose(-1, -2) * scale).softmax(-1)
        return self.out(x + self.o(weights @ self.v(h)))


def test_a_growing_head_sets_the_models_own_scale_and_export_folds_it() -> None:
    torch.manual_seed(0)
    model, base = Attend(128, True), Attend(32, True)
    plan = iso.plan(model, "complete-d", base=base, hps=HPS)
    (site,) = plan.sites
    assert (site.attr, site.multiplier) == ("scale", pytest.approx(128**-0.5 / 2))  # 1/d against the base's 1/sqrt(d)
    plan.apply(model)
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    want = model(ids)
    iso.export(model, plan)
    assert model.scale == 128**-0.5
    iso.export(model, plan)  # twice changes nothing
    torch.testing.assert_close(model(ids), want, rtol=0, atol=1e-5)
    plain = Attend(128, True)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(ids), want, rtol=0, atol=1e-5)


def test_a_scale_in_the_code_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"0\.0883883 of Attend is written into its code") as caught:
        iso.plan(Attend(128, False), "complete-d", base=Attend(32, False), hps=HPS)
    assert "self.scale" in caught.value.hint
    iso.plan(Attend(128, False), "complete-d", base=Attend(32, False), hps=HPS, axes=("depth",))  # no width rule: fine


@pytest.mark.parametrize("make", [llama, gpt2, nanogpt])
def test_export_gives_a_plain_model(make: Make) -> None:
    model = seeded(make, 128, 4)
    keys = set(model.state_dict())
    plan = planned(make, model, absorb=False)
    plan.apply(model)
    assert set(model.state_dict()) != keys
    train(model, torch.optim.AdamW(plan.param_groups(model)), 2)
    ids = torch.randint(256, (2, 8))
    want = logits(model, ids)
    assert iso.export(model, plan) is model
    assert set(model.state_dict()) == keys
    fresh = make(128, 4).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(fresh, ids), want, rtol=0, atol=1e-6)


def test_a_base_scale_is_enough_for_a_hugging_face_model() -> None:
    model = seeded(llama, 128, 4)
    by_scale = iso.plan(model, "complete-d", base=iso.Scale(width=64, depth=2), hps=HPS)
    assert by_scale.rows == planned(llama, model).rows
    with torch.device("meta"):
        meta, small = llama(128, 4), llama(64, 2)
    on_meta = iso.plan(meta, "complete-d", base=small, hps=HPS)
    assert [(r.lr, r.eps, r.init_std) for r in on_meta.rows] == [(r.lr, r.eps, r.init_std) for r in by_scale.rows]


def test_wrapping_changes_no_number() -> None:
    model = seeded(llama, 128, 4)
    plan = planned(llama, model)
    compiled = torch.compile(copy.deepcopy(model))
    assert len(plan.param_groups(compiled)) == len(plan.param_groups(model))
    hooked = seeded(llama, 128, 4)
    other = planned(llama, hooked, absorb=False)
    other.apply(hooked)
    assert [row.name for row in other.rows] == [row.name for row in plan.rows]
    assert sum(len(g["params"]) for g in other.param_groups(hooked)) == len(plan.rows)


def test_frozen_parameters_are_neither_scaled_nor_trained() -> None:
    model = seeded(llama, 128, 4)
    frozen = model.model.layers[0].mlp.down_proj.weight  # type: ignore[union-attr,index]
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    plan = planned(llama, model)
    row = plan.row("model.layers.0.mlp.down_proj.weight")
    assert row.hook == 0.5  # its branch factor cannot go into a weight that is not ours
    plan.apply(model)
    inner = model.model.layers[0].mlp.down_proj  # type: ignore[union-attr,index]
    torch.testing.assert_close(inner.weight, before / 2)
    assert torch.equal(inner.parametrizations.weight.original, before)
    trained = [p for group in plan.param_groups(model) for p in group["params"]]
    assert not any(p is inner.parametrizations.weight.original for p in trained)


class Quantised(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a = nn.Linear(8, width)
        self.codes = nn.Parameter(torch.zeros(width, 8, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(128, 2)), "the base is larger than the target"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=iso.Scale(width=128)), "the base is larger than the target"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=gpt2(64, 2)), "base is a GPT2LMHeadModel"),
        (lambda: iso.plan(nanogpt(64, 2), "complete-d", base=nanogpt(64, 2)), "nothing differs between base and target"),
        (lambda: iso.infer_roles(llama(64, 2), llama(64, 2)), "nothing differs"),
        (lambda: iso.plan(nanogpt(64, 2), "complete-d", base=iso.Scale(width=32)), "no config to make a smaller one"),
        (lambda: iso.plan(llama(64, 2), "complete-d"), "needs base="),
        (lambda: iso.plan(llama(96, 2), "complete-d", base=iso.Scale(width=50)), "no whole number of heads"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), optimizer="adan"), "unknown optimiser"),
        (lambda: iso.plan(Quantised(), "complete-d", base=Quantised(16)), "codes is quantised"),
        (lambda: iso.plan(llama(64, 2), "u-mup"), "needs a model made of unit-scaled ops"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), roles={"*.q": "hidden"}), "matches no parameter"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), hps={"alpha_loss": 2.0}), "cannot be set on a"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), hps={"lr": float("nan")}), "positive and finite"),
        (lambda: iso.plan(nn.Identity(), "complete-d", base=nn.Identity()), "no parameters"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), hps={"lr": "0.1"}), "lr must be a number"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), hps={"lr": True}), "lr must be a number"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), hps={"lr": 10**400}), "lr must be a number"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), hps={"beta2": 1.5}), r"must lie in \[0, 1\)"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), hps={"betas": 0.9}), "unknown hyperparameter"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), hps=0.1), "hps is a dict"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=32), "base is a Scale or a model"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=iso.Scale()), "base says nothing"),
        (lambda: iso.plan("llama", "complete-d", base=llama(32, 2)), "no nn.Module"),
        (lambda: iso.plan(llama(64, 2), None, base=llama(32, 2)), "a name or a Table"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), optimizer=torch.optim.AdamW), "name of a family"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), roles=["hidden"]), "roles is a dict"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), clip=-1), "positive gradient norm"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=llama(32, 2), alpha="1"), "alpha must be a number"),
        (lambda: iso.plan(llama(64, 2), "complete-d", base=iso.Scale(width=32, batch_tokens=9, tokens=3)), "whole run"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_wrong(call: Callable[[], object], words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        call()
    assert caught.value.hint or caught.value.key


class Plain(nn.Module):
    """Layers without residual branches, as many as asked for."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, 4)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.last(x)


def test_a_name_as_the_table_prints_it_finds_its_row() -> None:
    plan = planned(llama, seeded(llama, 128, 4))
    assert plan.row("model.layers.*.mlp.up_proj").name == "model.layers.0.mlp.up_proj.weight"
    assert plan.row("lm_head").name == "lm_head.weight"
    with pytest.raises(PlanError, match=r"no parameter 'model\.layers'"):
        plan.row("model.layers")


def test_more_layers_without_residual_branches_are_refused() -> None:
    with pytest.raises(PlanError, match="no depth rule holds for it"):
        iso.plan(Plain(64, 4), "complete-d", base=Plain(32, 2), hps=HPS)
    made = iso.plan(Plain(64, 4), "complete-d", base=Plain(32, 2), hps=HPS, axes=("width", "batch", "duration"))
    assert made.row("layers.3.weight").relative.lr == 0.5
    assert iso.plan(Plain(64, 2), "complete-d", base=Plain(32, 2), hps=HPS).row("last.weight").role == "readout"


class Bent(nn.Module):
    """A head whose weight is normalised before its matmul."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, width), nn.Linear(width, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.embed(ids), nn.functional.normalize(self.head.weight))


def test_a_weight_behind_something_nonlinear_is_not_guessed() -> None:
    with pytest.raises(PlanError, match="goes through something nonlinear before its matmul") as caught:
        iso.infer_roles(Bent(64), Bent(32))
    assert 'roles={"head.weight": "hidden"}' in caught.value.hint
    made = iso.plan(Bent(64), "complete-d", base=Bent(32), hps=HPS, roles={"head.weight": "readout"})
    assert made.row("head.weight").relative.lr == 0.5
