"""Ten foreign architectures: every parameter's role, fan-in and place, by hand; the same in every disguise.

Widths 64 -> 128, depth 2 -> 4. Then models that no rule fits: each refused in words, and the remedy that the hint names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from disguises import box, rename, reorder
from foreign_models import bert, gpt2, llama, mamba, mistral, mixtral, nanogpt, qwen3, resnet, vit
from torch import Tensor, nn

import isoscale as iso
from isoscale._base.errors import PlanError
from isoscale.planning.foreign_roles import foreign_infos
from isoscale.planning.growth import named, partners
from isoscale.planning.trace import trace

Want = tuple[str, int, bool]
Table = dict[str, Want]
W, VOCAB = 128, 256
FFN = 4 * W


def _gpt(blocks: str, ends: str) -> Table:
    return {
        f"{ends}wte.weight": ("embedding", VOCAB, False),
        f"{ends}wpe.weight": ("embedding", 128, False),
        f"{blocks}.ln_[12].weight": ("gain", W, True),
        f"{blocks}.ln_[12].bias": ("bias", W, True),
        f"{blocks}.attn.c_*.weight": ("hidden", W, True),
        f"{blocks}.attn.c_attn.bias": ("bias", 3 * W, True),
        f"{blocks}.attn.c_proj.bias": ("bias", W, True),
        f"{blocks}.mlp.c_fc.weight": ("hidden", W, True),
        f"{blocks}.mlp.c_fc.bias": ("bias", FFN, True),
        f"{blocks}.mlp.c_proj.weight": ("hidden", FFN, True),
        f"{blocks}.mlp.c_proj.bias": ("bias", W, True),
        f"{ends}ln_f.*": ("final_norm", W, False),
    }


LLAMA: Table = {
    "model.embed_tokens.weight": ("embedding", VOCAB, False),
    "model.layers.*.self_attn.[qkvo]_proj.weight": ("hidden", W, True),
    "model.layers.*.mlp.gate_proj.weight": ("hidden", W, True),
    "model.layers.*.mlp.up_proj.weight": ("hidden", W, True),
    "model.layers.*.mlp.down_proj.weight": ("hidden", FFN, True),
    "model.layers.*layernorm.weight": ("gain", W, True),
    "model.norm.weight": ("final_norm", W, False),
    "lm_head.weight": ("readout", W, False),
}
BERT: Table = {
    "bert.embeddings.word_embeddings.weight": ("embedding", VOCAB, False),
    "bert.embeddings.position_embeddings.weight": ("embedding", 128, False),
    "bert.embeddings.token_type_embeddings.weight": ("embedding", 2, False),
    "bert.embeddings.LayerNorm.weight": ("gain", W, False),
    "bert.embeddings.LayerNorm.bias": ("bias", W, False),
    "bert.encoder.layer.*.attention.self.*.weight": ("hidden", W, True),
    "bert.encoder.layer.*.attention.self.*.bias": ("bias", W, True),
    "bert.encoder.layer.*.attention.output.dense.weight": ("hidden", W, True),
    "bert.encoder.layer.*.attention.output.dense.bias": ("bias", W, True),
    "bert.encoder.layer.*.intermediate.dense.weight": ("hidden", W, True),
    "bert.encoder.layer.*.intermediate.dense.bias": ("bias", FFN, True),
    "bert.encoder.layer.?.output.dense.weight": ("hidden", FFN, True),
    "bert.encoder.layer.?.output.dense.bias": ("bias", W, True),
    # norms behind the add stand on the stream: their gradient knows no branch factor
    "bert.encoder.layer.*.attention.output.LayerNorm.weight": ("gain", W, False),
    "bert.encoder.layer.*.attention.output.LayerNorm.bias": ("bias", W, False),
    "bert.encoder.layer.[012].output.LayerNorm.weight": ("gain", W, False),
    "bert.encoder.layer.[012].output.LayerNorm.bias": ("bias", W, False),
    "bert.encoder.layer.3.output.LayerNorm.*": ("final_norm", W, False),
    "cls.predictions.transform.dense.weight": ("hidden", W, False),
    "cls.predictions.transform.dense.bias": ("bias", W, False),
    "cls.predictions.transform.LayerNorm.*": ("final_norm", W, False),
    "cls.predictions.bias": ("finite", VOCAB, False),
}
VIT: Table = {
    "vit.embeddings.cls_token": ("embedding", 1, False),
    "vit.embeddings.position_embeddings": ("embedding", 17, False),
    "vit.embeddings.patch_embeddings.projection.weight": ("input", 3 * 8 * 8, False),
    "vit.embeddings.patch_embeddings.projection.bias": ("bias", W, False),
    "vit.layers.*.attention.?_proj.weight": ("hidden", W, True),
    "vit.layers.*.attention.?_proj.bias": ("bias", W, True),
    "vit.layers.*.layernorm_*.weight": ("gain", W, True),
    "vit.layers.*.layernorm_*.bias": ("bias", W, True),
    "vit.layers.*.mlp.fc1.weight": ("hidden", W, True),
    "vit.layers.*.mlp.fc1.bias": ("bias", FFN, True),
    "vit.layers.*.mlp.fc2.weight": ("hidden", FFN, True),
    "vit.layers.*.mlp.fc2.bias": ("bias", W, True),
    "vit.layernorm.*": ("final_norm", W, False),
    "classifier.weight": ("readout", W, False),
    "classifier.bias": ("finite", 10, False),
}
MIXTRAL: Table = {
    **{key: value for key, value in LLAMA.items() if ".mlp." not in key},
    "model.layers.*.mlp.gate.weight": ("router", W, True),
    "model.layers.*.mlp.experts.gate_up_proj": ("hidden", W, True),
    "model.layers.*.mlp.experts.down_proj": ("hidden", 2 * W, True),
}
MAMBA: Table = {
    "backbone.embeddings.weight": ("embedding", VOCAB, False),
    "backbone.layers.*.norm.weight": ("gain", W, True),
    "backbone.layers.*.mixer.A_log": ("vector", 16, True),
    "backbone.layers.*.mixer.D": ("vector", 2 * W, True),
    "backbone.layers.*.mixer.conv1d.weight": ("input", 4, True),  # each channel on its own: four taps at any width
    "backbone.layers.*.mixer.conv1d.bias": ("bias", 2 * W, True),
    "backbone.layers.*.mixer.in_proj.weight": ("hidden", W, True),
    "backbone.layers.*.mixer.x_proj.weight": ("hidden", 2 * W, True),
    "backbone.layers.*.mixer.dt_proj.weight": ("hidden", W // 16, True),
    "backbone.layers.*.mixer.dt_proj.bias": ("bias", 2 * W, True),
    "backbone.layers.*.mixer.out_proj.weight": ("hidden", 2 * W, True),
    "backbone.norm_f.weight": ("final_norm", W, False),
}
RESNET: Table = {
    "stem.weight": ("input", 3 * 9, False),
    "bn.weight": ("gain", W, False),
    "bn.bias": ("bias", W, False),
    "blocks.[0123].conv?.weight": ("hidden", 9 * W, True),
    "blocks.[0123].bn?.weight": ("gain", W, True),
    "blocks.[0123].bn?.bias": ("bias", W, True),
    "blocks.4.conv1.weight": ("hidden", 9 * W, False),  # its skip is a projection, so it is no residual branch
    "blocks.4.conv2.weight": ("hidden", 18 * W, False),
    "blocks.4.bn?.weight": ("gain", 2 * W, False),
    "blocks.4.bn?.bias": ("bias", 2 * W, False),
    "blocks.4.down.0.weight": ("hidden", W, False),
    "blocks.4.down.1.weight": ("gain", 2 * W, False),
    "blocks.4.down.1.bias": ("bias", 2 * W, False),
    "blocks.[567].conv?.weight": ("hidden", 18 * W, True),
    "blocks.[567].bn?.weight": ("gain", 2 * W, True),
    "blocks.[567].bn?.bias": ("bias", 2 * W, True),
    "fc.weight": ("readout", 2 * W, False),
    "fc.bias": ("finite", 10, False),
}
CASES: list[tuple[Callable[..., nn.Module], Table]] = [
    (llama, LLAMA),
    (gpt2, _gpt("transformer.h.*", "transformer.")),
    (mistral, LLAMA),
    (qwen3, {**LLAMA, "model.layers.*.self_attn.[qk]_norm.weight": ("finite", 16, True)}),
    (bert, BERT),
    (vit, VIT),
    (mixtral, MIXTRAL),
    (mamba, MAMBA),
    (resnet, RESNET),
    (nanogpt, _gpt("h.*", "")),
]
ALL = pytest.mark.parametrize(("make", "table"), CASES, ids=[make.__name__ for make, _ in CASES])
EXAMPLES = {  # what a hand-written model takes is guessed from its first layer, which another order changes
    "resnet": torch.zeros(2, 3, 16, 16), "nanogpt": torch.zeros(2, 16, dtype=torch.long),
}  # fmt: skip


def pair(make: Callable[..., nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return make(W, 4).eval(), make(W // 2, 2).eval()


def wanted(table: Table, names: list[str]) -> dict[str, Want]:
    """The hand-written table spelt out: each name has one line, each line a name."""
    out = {}
    hits = dict.fromkeys(table, 0)
    for name in names:
        found = [key for key in table if fnmatchcase(name, key)]
        assert len(found) == 1, (name, found)
        hits[found[0]] += 1
        out[name] = table[found[0]]
    assert all(hits.values()), hits
    return out


def seen(big: nn.Module, small: nn.Module, example: object = None) -> dict[str, Want]:
    infos, _ = foreign_infos(big, small, partners(big, small), trace(big, example))
    roles = iso.infer_roles(big, small, example=example)
    plan = iso.plan(big, "complete-d", base=small, example=example)
    assert {row.name: row.role for row in plan.rows} == roles == {name: info.role for name, info in infos.items()}
    assert {row.name: row.fan_in for row in plan.rows} == {name: info.fan_in for name, info in infos.items()}
    return {name: (info.role, info.fan_in, info.in_stack) for name, info in infos.items()}


@ALL
def test_every_parameter_by_hand(make: Callable[..., nn.Module], table: Table) -> None:
    big, small = pair(make)
    found = seen(big, small)
    assert found == wanted(table, list(found))


@ALL
@pytest.mark.parametrize("how", ["renamed", "reordered", "boxed"])
def test_the_same_in_every_disguise(make: Callable[..., nn.Module], table: Table, how: str) -> None:
    big, small = pair(make)
    names = {id(parameter): name for name, parameter in big.named_parameters()}
    want = wanted(table, list(names.values()))
    example = None
    if how == "renamed":
        rename(big, 1), rename(small, 1)
        assert not set(named(big)) & set(names.values())
    elif how == "boxed":
        box(big, 1), box(small, 1)
        assert sum(".held." in name for name in named(big)) > len(want) / 2
    else:  # two orders: a tied weight may be listed under one name here and under the other there
        reorder(big, 1), reorder(small, 2)
        example = EXAMPLES.get(make.__name__)
        assert list(named(big)) != list(names.values())
    found = seen(big, small, example)
    assert {names[id(parameter)]: found[name] for name, parameter in named(big).items()} == want


def test_control_the_disguises_do_hide() -> None:
    """The same names with another forward behind them: roles follow the forward."""
    big, small = (Lambda(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(8, w), b=nn.Linear(w, 4)) for w in (64, 32))
    here, there = iso.infer_roles(big, small), ("a.weight", "b.weight")
    assert [here[name] for name in there] == ["input", "readout"]
    for model, width in ((big, 64), (small, 32)):
        model.a, model.b, model.function = nn.Linear(width, 4), nn.Linear(8, width), lambda m, x: m.a(F.relu(m.b(x)))
    swapped = iso.infer_roles(big, small, example=torch.zeros(2, 8))
    assert [swapped[name] for name in there] == ["readout", "input"]


@pytest.mark.parametrize("depth", [3, 8])
def test_layers_find_the_layer_of_their_own_stage(depth: int) -> None:
    big, small = resnet(32, depth), resnet(16, 2)
    for name, other in partners(big, small).items():
        shape, base = named(big)[name].shape, named(small)[other].shape
        grown = [a / b for a, b in zip(shape, base)]
        assert all(ratio in (1, 2) for ratio in grown), (name, other)


def test_a_weight_for_each_channel_alone_has_as_many_outputs_as_channels() -> None:
    big, small = pair(mamba)
    row = iso.plan(big, "complete-d", base=small).row("backbone.layers.0.mixer.conv1d.weight")
    assert (row.fan_in, row.fan_out) == (4, 2 * W)
    assert row.relative.eps == pytest.approx(1 / 4)  # twice the channels, twice the branches


class Lambda(nn.Module):
    """A module from a function and named parts."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Two(Lambda):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.function(self, x, y)


class Stack(nn.Module):
    """Layers in a row, each one `step(layer, x)`."""

    def __init__(self, width: int, depth: int, step: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, width), nn.Linear(width, 4)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = self.step(layer, x)
        return self.out(x)


class Tied(nn.Module):
    def __init__(self, width: int, norm: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(32, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(width, 32, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.mix(x)))


class Attend(nn.Module):
    def __init__(self, width: int, heads: int = 1, attribute: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, width) for _ in range(3))
        self.out, self.heads = nn.Linear(width, 4), heads
        if attribute:
            self.scale = (width // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(0, 1) for m in (self.q, self.k, self.v))
        scale = getattr(self, "scale", None) or q.shape[-1] ** -0.5
        return self.out(((q @ k.mT * scale).softmax(-1) @ v).transpose(0, 1).flatten(1))


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.1 * torch.randn(shape))


def mlp(function: Callable[..., Tensor], kind: type[Lambda] = Lambda, **sizes: Any) -> Callable[[int], nn.Module]:
    """From 8 to a width and from a width to 4 with something between; `sizes` are functions of the width."""

    def build(width: int) -> nn.Module:
        return kind(function, a=nn.Linear(8, width), b=nn.Linear(width, 4), **{k: v(width) for k, v in sizes.items()})

    return build


def centres(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.cdist(m.a(x), m.w))


def planned(make: Callable[..., nn.Module], **said: Any) -> iso.Plan:
    return iso.plan(make(64), "complete-d", base=make(32), **said)


X = torch.zeros(4, 8)
UNUSED = mlp(lambda m, x: m.b(F.relu(m.a(x))), w=lambda w: table(w, w))
SOMETIMES = mlp(lambda m, x: m.b(F.relu(m.a(x) @ m.w if len(x) > 6 else m.a(x))), w=lambda w: table(w, w))
BOTH_SIDES = mlp(lambda m, x: m.b(F.relu(m.a(x) @ m.w) @ m.w.T), w=lambda w: table(w, 2 * w))
DISTANCES = mlp(centres, w=lambda w: table(w, w))
BY_HAND = mlp(lambda m, x: m.b((m.a(x)[:, None, :] * m.w).sum(-1)), w=lambda w: table(w, w))
DIMENSIONS = mlp(lambda m, x: m.b(m.a(x) @ m.w.flatten(1)), w=lambda w: table(w, w) if w < 64 else table(w, w // 2, 2))
LACKS = mlp(lambda m, x: m.b(m.a(x)), c=lambda w: nn.LayerNorm(w, bias=w > 32))
GUESS = mlp(lambda m, x, y: m.b(m.a(x) * m.a(y)), Two)


def nonlinear(depth: int) -> Callable[[int], nn.Module]:
    return lambda width: Stack(width, depth if width > 32 else 2, lambda layer, x: x + F.relu(layer(x)))


def straight(width: int) -> nn.Module:
    return Stack(width, 4 if width > 32 else 2, lambda layer, x: F.relu(layer(x)))


def deep(width: int) -> nn.Module:
    return Stack(width, 4 if width > 32 else 2, lambda layer, x: x + layer(F.relu(x)))


DEPTHS: dict[str, Any] = {"base_run": iso.Scale(depth=2), "target": iso.Scale(depth=4)}
TRICKY: dict[str, tuple[Callable[[], object], str, str, Callable[[], object] | None]] = {
    "never used": (
        lambda: planned(UNUSED), r"never used 1 parameter: w \(64, 64\)", r'roles=\{"w": "hidden"\}',
        lambda: planned(UNUSED, roles={"w": "hidden"}),
    ),
    "used by another input": (
        lambda: planned(SOMETIMES, example=X), "never used 1 parameter: w", "an example= that reaches",
        lambda: planned(SOMETIMES, example=torch.zeros(8, 8)),
    ),
    "along both sides": (
        lambda: planned(BOTH_SIDES), "multiplied along different sides", r'roles=\{"w": "hidden"\}',
        lambda: planned(BOTH_SIDES, roles={"w": "hidden"}),
    ),
    "an operation no rule knows": (
        lambda: planned(DISTANCES), "w grows along 2 of its 2 dimensions and is in an operation that no rule knows", r'roles=\{"w": "hidden"\}',
        lambda: planned(DISTANCES, roles={"w": "hidden"}),
    ),
    "a product written by hand": (
        lambda: planned(BY_HAND), "w grows along 2 of its 2 dimensions and is in an operation that no rule knows", r'roles=\{"w": "hidden"\}',
        lambda: planned(BY_HAND, roles={"w": "hidden"}),
    ),
    "other dimensions": (lambda: planned(DIMENSIONS), "w has 3 dimensions, in the base 2", "from one class", None),
    "the base lacks one": (lambda: planned(LACKS), r"the base model has no c\.bias", "same switches", None),
    "the model lacks one": (
        lambda: planned(lambda w: Tied(w, norm=w < 64)), r"the base model has norm\.weight, and the model has not",
        "same switches", None,
    ),
    "tied in the base only": (
        lambda: planned(lambda w: Tied(w, True, tied=w < 64)), r"head\.weight is embed\.weight too in the base",
        "tying", lambda: planned(lambda w: Tied(w, True)),
    ),
    "tied in the target only": (
        lambda: planned(lambda w: Tied(w, True, tied=w > 32)), r"the base model has head\.weight, and the model has not",
        "tying", lambda: planned(lambda w: Tied(w, True, tied=False)),
    ),
    "a branch that ends in nothing": (
        lambda: planned(nonlinear(4)), "does not end in a weight or a gain", "or transfer at one depth",
        lambda: planned(nonlinear(2)),
    ),
    "depth without branches": (
        lambda: planned(straight, **DEPTHS), "no residual branches: no depth rule", "axes=",
        lambda: planned(straight, **DEPTHS, axes=("width", "batch", "duration")),
    ),
    "a scale in the code": (
        lambda: planned(Attend), "is written into its code", r"self\.scale",
        lambda: (planned(lambda w: Attend(w, attribute=True)), planned(lambda w: Attend(w, heads=w // 32))),
    ),
    "inputs nobody guesses": (
        lambda: planned(GUESS), "no example can be guessed for Two, whose forward needs x, y", "give example=",
        lambda: planned(GUESS, example=(X, X)),
    ),
    "inputs by keyword": (
        lambda: planned(GUESS, example=(X,)), "forward of Two failed on the given example", r"forward\(x.*y",
        lambda: planned(GUESS, example={"x": X, "y": X}),
    ),
    "tied without a norm": (
        lambda: planned(Tied), r"embed\.weight is tied to the readout with no norm", "untie it, or add a final norm",
        lambda: (planned(lambda w: Tied(w, norm=True)), planned(lambda w: Tied(w, tied=False))),
    ),
    "quantised": (
        lambda: planned(mlp(lambda m, x: m.b(m.a(x)), w=lambda w: nn.Parameter(torch.zeros(w, dtype=torch.int8), False))),
        r"w is quantised \(Tensor, torch.int8\)", "plan first, quantise after", None,
    ),
    "a wider base": (
        lambda: iso.plan(GUESS(32), "complete-d", base=GUESS(64), example=(X, X)), "base is larger than the target",
        "the smaller model", lambda: planned(GUESS, example=(X, X)),
    ),
    "a deeper base": (
        lambda: iso.plan(deep(32), "complete-d", base=Stack(32, 4, deep(32).step)), "base is larger .* layers has 4",
        "were tuned", lambda: planned(deep),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*not used by the forward")
@pytest.mark.parametrize("name", TRICKY)
def test_refused_in_words_and_the_remedy_works(name: str) -> None:
    call, words, hint, remedy = TRICKY[name]
    with pytest.raises(PlanError, match=words) as caught:
        call()
    assert re.search(hint, caught.value.hint)
    if remedy is not None:
        remedy()
