"""Each finding of the doctor in a set-up that has it, and not in its control; what it refuses; its screen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isoscale as iso
from isoscale._base.errors import ConfigError, PlanError
from isoscale.check.doctor import Diagnosis, examine
from isoscale.cli.app import main
from isoscale.cli.doctor import screen
from isoscale.models import Decoder, DecoderConfig

BASE, VOCAB = (32, 2), 64
SIZES: dict[str, Any] = {"widths": (32, 128), "depths": (2, 8)}
IDS = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
Setup = Callable[[int, int], Any]


class Block(nn.Module):
    def __init__(self, width: int, head: int, inlined: bool) -> None:
        super().__init__()
        self.heads = width // head
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        if not inlined:
            self.scale = head**-0.5

    def forward(self, x: Tensor, factor: float) -> Tensor:
        h = self.norm(x)
        q, k, v = (m(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        scale = getattr(self, "scale", None) or q.shape[-1] ** -0.5
        x = x + factor * self.o(((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + factor * self.down(F.gelu(self.up(self.mlp_norm(x))))


class Model(nn.Module):
    """A small language model with the usual choices as switches."""

    def __init__(
        self, width: int, depth: int, *, head: int = 16, inlined: bool = True, tied: bool = False, factor: float = 1.0,
        embedding_std: float = 0.02,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList([Block(width, head, inlined) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)
        self.factor = factor
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.embed.weight, std=embedding_std)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.factor)
        return self.head(self.norm(x))


def groups(
    model: nn.Module, lr: Callable[[str, nn.Parameter], float], eps: Callable[[float], float] = lambda share: 1e-8,
    decay: Callable[[float], float] = lambda share: 0.1,
) -> list[dict[str, Any]]:  # fmt: skip
    """A group for each tensor, its LR a share of 1e-3; eps and decay from that share."""
    out = []
    for name, parameter in model.named_parameters():
        share = lr(name, parameter)
        out.append({"params": [parameter], "lr": 1e-3 * share, "eps": eps(share), "weight_decay": decay(share)})
    return out


def hidden(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and name.startswith("blocks.")


def adamw(**said: Any) -> Callable[..., torch.optim.AdamW]:
    return lambda model, width, depth: torch.optim.AdamW(groups(model, lr=lambda n, p: 1.0, **said))


def by_ratio(scaled: bool = True) -> Setup:
    """muP's LRs as ratios to the base, with or without the rest."""

    def setup(width: int, depth: int) -> Any:
        model, share = Model(width, depth), BASE[0] / width

        def lr(name: str, parameter: nn.Parameter) -> float:
            return share if hidden(name, parameter) or name == "head.weight" else 1.0

        made = groups(model, lr, lambda s: 1e-8 * share * BASE[1] / depth if scaled else 1e-8,
                      lambda s: 0.1 / s if scaled else 0.1)  # fmt: skip
        return model, torch.optim.AdamW(made)

    return setup


def planned(width: int, depth: int) -> Any:
    """What a plan makes: the control of every finding."""
    model = Model(width, depth)
    base = model if (width, depth) == BASE else Model(*BASE)
    plan = iso.plan(model, "complete-d", base=base, hps={"lr": 1e-3, "weight_decay": 0.1})
    plan.apply(model)
    return model, torch.optim.AdamW(plan.param_groups(model))


def constant(width: int, depth: int) -> Any:
    model = Model(width, depth)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def one_eps(width: int, depth: int) -> Any:
    model, optimizer = planned(width, depth)
    for group in optimizer.param_groups:
        group["eps"] = 1e-8
    return model, optimizer


def absolute(lr: Callable[[nn.Parameter, int], float]) -> Setup:
    def setup(width: int, depth: int) -> Any:
        model = Model(width, depth)
        return model, torch.optim.AdamW(groups(model, lambda n, p: lr(p, depth) if hidden(n, p) else 1.0))

    return setup


def raw_branches(width: int, depth: int) -> Any:
    return Model(width, depth, factor=1 / math.sqrt(depth))


def ratio_branches(width: int, depth: int) -> Any:
    return Model(width, depth, factor=math.sqrt(BASE[1] / depth))


def muon(power: float, adjust: str | None = None) -> Setup:
    def setup(width: int, depth: int) -> Any:
        model = Model(width, depth)
        inner = [p for n, p in model.named_parameters() if hidden(n, p)]
        ids = {id(p) for p in inner}
        share = BASE[0] / width
        matrices = torch.optim.Muon(inner, lr=0.02 * share**power, adjust_lr_fn=adjust)
        rest = [{"params": [p for n, p in model.named_parameters() if id(p) not in ids and n != "head.weight"]},
                {"params": [model.head.weight], "lr": 1e-3 * share}]  # fmt: skip
        return model, [matrices, torch.optim.AdamW(rest, lr=1e-3)]

    return setup


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def clipped(clip: float) -> Setup:
    return lambda width, depth: (*planned(width, depth), {"example": IDS, "loss": loss, "clip": clip})


def heads(*, inlined: bool, grow: bool) -> Setup:
    return lambda width, depth: Model(width, depth, inlined=inlined, head=width // 2 if grow else 16)


def tied(std: Callable[[int], float]) -> Setup:
    return lambda width, depth: Model(width, depth, tied=True, embedding_std=std(width))


def left_out(width: int, depth: int) -> Any:
    model = Model(width, depth)
    return model, torch.optim.AdamW([p for n, p in model.named_parameters() if "norm" not in n])


def frozen_on_purpose(width: int, depth: int) -> Any:
    model = Model(width, depth)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def in_two(width: int, depth: int) -> Any:
    model, optimizer = planned(width, depth)
    return model, [optimizer, torch.optim.SGD([model.head.weight], lr=0.1)]


CASES: dict[str, tuple[str, Setup, str, Setup]] = {
    "constant": ("constant-lr", constant, r"0\.001 at the base and 0\.001 at width x4.* have 0\.00025", planned),
    "constant init": ("constant-init", constant, r"has 0\.0\d+ at the base and 0\.0\d+ at width", planned),
    "one eps": ("one-eps", one_eps, r"has 1e-08 at the base and 1e-08 at", planned),
    "one eps, by hand": ("one-eps", by_ratio(False), "one number for all", by_ratio()),
    "decay": ("decay-not-scaled", by_ratio(False), r"lr x decay 0\.0001 at the base and 2\.5e-05", by_ratio()),
    "by fan-in": (
        "absolute-ratio", absolute(lambda p, depth: 32 / p.shape[1]), r"down.weight has a 4 times smaller LR",
        by_ratio(),
    ),
    "by fan-in, nothing else": (
        "absolute-ratio", absolute(lambda p, depth: p.shape[1] ** -0.5), r"2 times smaller LR.*\^-1/2", by_ratio(),
    ),
    "by depth": ("absolute-ratio", absolute(lambda p, depth: depth**-0.5), r"0\.707, which is depth\^-1/2", by_ratio()),
    "branches by depth": ("absolute-ratio", raw_branches, r"branches are multiplied by depth\^-1/2", ratio_branches),
    "muon": ("muon-scaled-twice", muon(1.0), r"by 0\.25 at width x4, and with .*'original' .* by 1", muon(0.0)),
    "muon as adamw": (
        "muon-scaled-twice", muon(0.0, "match_rms_adamw"), r"'match_rms_adamw' .* by 0\.5",
        muon(0.5, "match_rms_adamw"),
    ),
    "clip": ("clip-binds", clipped(1e-3), r"each of 5 steps: 0\.001 against", clipped(1e3)),
    "heads grow": (
        "inlined-attention-scale", heads(inlined=True, grow=True), r"head size 16 at the base, 64 at width 128",
        heads(inlined=False, grow=True),
    ),
    "heads stay": (
        "inlined-attention-scale", heads(inlined=True, grow=True), "is written into its code",
        heads(inlined=True, grow=False),
    ),
    "tied": (
        "tied-rescaled", tied(lambda width: width**-0.5), r"init std falls with width: 0\.17\d* to 0\.08",
        tied(lambda width: 0.02),
    ),
    "left out": ("frozen-groups", left_out, r"tensors in no group at width 32, depth 2: .* and 7 more", frozen_on_purpose),
    "in two": ("frozen-groups", in_two, r"tensors in two groups.*: head\.weight", planned),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_found_where_it_is_and_not_where_it_is_not(case: str) -> None:
    name, bad, words, good = CASES[case]
    sick = examine(bad, **SIZES)
    (fault,) = [fault for fault in sick.faults if fault.name == name]
    with pytest.raises(ValueError, match=words):
        raise ValueError(fault.what)
    assert fault.why
    assert fault.remedy
    assert name not in examine(good, **SIZES).names()


def test_what_a_plan_makes_is_healthy() -> None:
    found = examine(planned, **SIZES)
    assert (found.faults, found.departures, found.law) == ((), (), "complete-d")
    assert screen(found).endswith("nothing found")


@pytest.mark.parametrize(
    ("setup", "law"),
    [(constant, "constant"), (by_ratio(), "complete-d"), (raw_branches, "none"), (one_eps, "complete-d")],
)
def test_the_law_that_is_followed(setup: Setup, law: str) -> None:
    assert examine(setup, **SIZES).law == law


def test_a_tensor_that_leaves_the_law_is_named() -> None:
    def setup(width: int, depth: int) -> Any:
        model, optimizer = planned(width, depth)
        made = [{**group, "params": [p]} for group in optimizer.param_groups for p in group["params"]]
        for group in made:
            if group["params"][0] is model.head.weight:
                group["lr"] = 1e-3
        return model, torch.optim.AdamW(made)

    found = examine(setup, **SIZES)
    assert found.departures == (("width", "head.weight", 1.0, 0.25),)
    assert "leaving that law: head.weight" in screen(found)


def test_what_the_mup_package_makes() -> None:
    """Its LRs follow muP and its decay is scaled; it has one eps, and that is found."""
    mup = pytest.importorskip("mup")

    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, width), nn.Linear(width, width), mup.MuReadout(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    def setup(width: int) -> Any:
        model = Net(width)
        mup.set_base_shapes(model, Net(32), delta=Net(64))
        return model, mup.MuAdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    found = examine(setup, widths=(32, 128))
    assert (found.law, found.names(), found.departures) == ("mup", {"one-eps"}, ())


def test_one_axis_or_a_function_of_width_alone() -> None:
    deeper = examine(constant, widths=(32,), depths=(2, 8))
    assert set(deeper.sizes) == {"base", "depth"}
    assert "constant-lr" not in deeper.names()  # with alpha 1 no LR depends on depth
    wider = examine(lambda width: constant(width, 2), widths=(32, 64))
    assert set(wider.sizes) == {"base", "width"}
    assert "constant-lr" in wider.names()


def test_nothing_is_trained_and_nothing_moves() -> None:
    kept: list[nn.Module] = []

    def setup(width: int, depth: int) -> Any:
        made = planned(width, depth)
        kept.append(made[0])
        return made

    examine(setup, **SIZES)
    for model, size in zip(kept, (BASE, (128, 2), (32, 8)), strict=True):
        torch.manual_seed(0)
        fresh = planned(*size)[0]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))


def test_the_random_state_of_the_caller_stays() -> None:
    state = torch.get_rng_state()
    examine(constant, **SIZES)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("setup", "sizes", "words"),
    [
        (lambda w, d: 3, {}, r"the function returned \(int\)"),
        (lambda w, d: (Model(w, d), "adamw"), {}, r"returned \(Model, str\)"),
        (lambda w, d: (Model(w, d), None, 5), {}, r"returned \(Model, NoneType, int\)"),
        (lambda w, d: (Model(w, d), None, {"clib": 1}), {}, "unknown extra 'clib'"),
        (lambda w, d: 1 / 0, {}, "the function raised ZeroDivisionError"),
        (constant, {"widths": (64, 32)}, "the base comes first"),
        (constant, {"widths": (64,), "depths": (2,)}, "there is only one"),
        (constant, {"widths": (1, 2, 3)}, "one size, or the base's and a larger one"),
    ],
)
def test_refusals(setup: Any, sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        examine(setup, **{**SIZES, **sizes})
    assert caught.value.key


def test_a_unit_scaled_model_is_refused() -> None:
    def setup(width: int, depth: int) -> nn.Module:
        return Decoder(DecoderConfig(vocab=VOCAB, width=width, depth=depth, head_size=16))

    with pytest.raises(PlanError, match="unit-scaled") as caught:
        examine(setup, **SIZES)
    assert "isoscale check" in caught.value.hint


@pytest.mark.parametrize("optimizer", ["muon", "muon-rms"])
def test_muon_by_plan_is_healthy(optimizer: str) -> None:
    def setup(width: int, depth: int) -> Any:
        model = Model(width, depth)
        base = model if (width, depth) == BASE else Model(*BASE)
        plan = iso.plan(model, "complete-d", base=base, optimizer=optimizer, hps={"lr": 0.01})
        plan.apply(model)
        adjust = "match_rms_adamw" if optimizer == "muon-rms" else None
        matrices = torch.optim.Muon(plan.param_groups(model, part=optimizer), adjust_lr_fn=adjust)
        return model, (matrices, torch.optim.AdamW(plan.param_groups(model, part="adamw")))

    found = examine(setup, **SIZES)
    assert (found.faults, found.departures) == ((), ())


def test_a_role_that_the_forward_does_not_tell_can_be_said() -> None:
    class Odd(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.w, self.b = nn.Linear(8, width), nn.Parameter(torch.ones(width, width)), nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) @ self.w @ self.w.T)

    with pytest.raises(PlanError, match="different sides"):
        examine(lambda width: Odd(width), widths=(8, 16))
    assert examine(lambda width: (Odd(width), None, {"roles": {"w": "hidden"}}), widths=(8, 16)).law == "none"


@pytest.fixture
def setups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "doctor_setups"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def sick(width):\n"
        "    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 4))\n"
        "    return model, torch.optim.AdamW(model.parameters())\n"
        "def well(width):\n    return sick(width)[0]\n"
    )
    monkeypatch.chdir(tmp_path)
    return name


def test_the_command(setups: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", f"{setups}:sick", "--width", "16,64"]) == 1
    text = capsys.readouterr().out
    assert "constant-lr" in text
    assert "1 finding" in text
    assert max(map(len, text.splitlines())) <= 80
    assert main(["doctor", "--model", f"{setups}:sick", "--width", "16,64", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in data["findings"]] == ["constant-lr"]
    assert main(["doctor", "--model", f"{setups}:well", "--width", "16,64"]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert main(["doctor", "--model", f"{setups}:sikc"]) == 2
    said = capsys.readouterr().err
    assert "sick" in said
    assert "--model" in said
    assert main(["doctor", "--model", f"{setups}:sick", "--width", "16;64"]) == 2


@pytest.mark.parametrize("setup", [constant, one_eps, absolute(lambda p, depth: 32 / p.shape[1]), muon(1.0), in_two])
def test_the_screen_fits_80_columns(setup: Setup) -> None:
    found: Diagnosis = examine(setup, **SIZES)
    assert found.faults
    assert max(map(len, screen(found).splitlines())) <= 80
