"""What must not be found, what must not matter, and what must stay as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_models import Experts, NanoGPT, llama, nanogpt, resnet
from torch import nn

from isoscale._base.errors import PlanError
from isoscale.models import Decoder, DecoderConfig
from isoscale.planning.trace import Trace, trace


class Lambda(nn.Module):
    """A module from a function and named submodules or parameters."""

    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
NOT_RESIDUAL = {
    "plain MLP": Lambda(lambda m, x: m.b(F.relu(m.a(x))), a=linear(), b=linear()),
    "tanh gelu spelt out": Lambda(
        lambda m, x: m.b((lambda h: 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.044715 * h**3))))(m.a(x))), a=linear(), b=linear()
    ),
    "sum of two branches": Lambda(lambda m, x: m.a(x) + m.b(x), a=linear(), b=linear()),
    "silu beside identity": Lambda(lambda m, x: (lambda h: m.b(h + F.silu(h)))(m.a(x)), a=linear(), b=linear()),
    "rotation": Lambda(
        lambda m, x: (lambda h: m.b(h * X.cos() + torch.cat([-h[:, 4:], h[:, :4]], -1) * X.sin()))(m.a(x)), a=linear(), b=linear()
    ),
}  # fmt: skip
RESIDUAL = {
    "plain": (lambda m, x: x + m.b(F.relu(m.a(x))), 1),
    "other order": (lambda m, x: m.b(F.relu(m.a(x))) + x, 1),
    "in place": (lambda m, x: x.clone().add_(m.b(F.relu(m.a(x)))), 1),
    "weighted": (lambda m, x: 0.7 * x + 0.3 * m.b(F.relu(m.a(x))), 1),
    "cast": (lambda m, x: (x.double() + m.b(F.relu(m.a(x))).double()).float(), 1),
    "dropout": (lambda m, x: x + F.dropout(m.b(F.relu(m.a(x))), 0.5, m.training), 1),
    "subtracted": (lambda m, x: x - m.b(F.relu(m.a(x))), 1),
    "fused into addcmul": (lambda m, x: torch.addcmul(x, m.b(F.relu(m.a(x))), torch.full((8,), 0.5)), 1),
    "two": (lambda m, x: (lambda h: h + m.b(F.relu(h)))(x + m.a(F.relu(x))), 2),
    "parallel, left": (lambda m, x: (x + m.a(x)) + m.b(x), 2),
    "parallel, right": (lambda m, x: x + (m.a(x) + m.b(x)), 1),
    "post-norm": (lambda m, x: F.layer_norm(x + m.b(F.relu(m.a(x))), (8,)), 1),
    "long skip over another": (lambda m, x: x + m.b(F.relu((lambda h: h + m.a(F.relu(h)))(x))), 1),
}


@pytest.mark.parametrize("name", NOT_RESIDUAL)
def test_no_branch_where_nothing_is_skipped(name: str) -> None:
    found = trace(NOT_RESIDUAL[name], X)
    assert found.branches == ()
    assert not any(use.inside or use.after for use in found.uses.values())
    assert found.feeds == {}


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_adds_in_every_spelling(name: str) -> None:
    function, count = RESIDUAL[name]
    model = Lambda(lambda m, x: m.out(function(m, m.stem(x))), stem=linear(), a=linear(), b=linear(), out=linear())
    found = trace(model, X)
    assert len(found.branches) == count
    assert all(branch.ends for branch in found.branches)
    assert found.uses["a.weight"].inside
    assert found.uses["out.weight"].after
    assert not found.uses["stem.weight"].inside
    assert not found.uses["stem.weight"].after


class Box(nn.Module):
    """Some class that nobody knows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def boxed(module: nn.Module) -> nn.Module:
    for name, child in list(module.named_children()):
        if isinstance(module, nn.ModuleList) or not isinstance(child, nn.ModuleList):
            boxed(child)
            setattr(module, name, Box(child))
        else:
            boxed(child)
    return module


def unboxed(text: str) -> str:
    return ".".join(part for part in text.split(".") if part != "inner")


def without(found: Trace, clean: Any) -> tuple[Any, ...]:
    """The trace with every name put through `clean`, paths left out."""
    names = lambda items: frozenset(map(clean, items))  # noqa: E731
    return (
        {clean(name): use for name, use in found.uses.items()},
        [names(branch.ends) for branch in found.branches],
        [(a.head_size, a.scale, names(a.queries), a.fused) for a in found.attention],
        {clean(name): names(feeds) for name, feeds in found.feeds.items()},
    )


def test_unknown_wrapper_classes_change_nothing() -> None:
    assert without(trace(boxed(nanogpt())), unboxed) == without(trace(nanogpt()), str)
    inner = llama()
    for layer in inner.model.layers:
        layer.mlp, layer.input_layernorm = Box(boxed(layer.mlp)), Box(layer.input_layernorm)
        layer.self_attn.q_proj = Box(layer.self_attn.q_proj)
    assert without(trace(inner), unboxed) == without(trace(llama()), str)


class Nameless(nn.Module):
    """nanoGPT out of bare parameters, numbered in an order of no meaning."""

    def __init__(self, of: NanoGPT) -> None:
        super().__init__()
        self.names = sorted((name for name, _ in of.named_parameters()), key=lambda name: name[::-1])
        self.depth = len(of.h)
        self.p = nn.ParameterList(of.get_parameter(name) for name in self.names)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        p = dict(zip(self.names, self.p))
        norm = lambda x, at: F.layer_norm(x, (64,), p[f"{at}.weight"], p[f"{at}.bias"])  # noqa: E731
        dense = lambda x, at: F.linear(x, p[f"{at}.weight"], p[f"{at}.bias"])  # noqa: E731
        x = p["wte.weight"][idx] + p["wpe.weight"][: idx.shape[1]]
        for i in range(self.depth):
            q, k, v = (
                y.unflatten(-1, (-1, 16)).transpose(1, 2) for y in dense(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
            )
            scores = torch.einsum("bhid,bhjd->bhij", q / math.sqrt(16), k)
            y = torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).flatten(2)
            x = x + dense(y, f"h.{i}.attn.c_proj")
            x = x + dense(F.gelu(dense(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
        return norm(x, "ln_f") @ p["wte.weight"].t()


def test_names_classes_and_order_say_nothing() -> None:
    model = Nameless(nanogpt())  # type: ignore[arg-type]
    back = lambda name: model.names[int(name.removeprefix("p."))]  # noqa: E731
    ids = torch.randint(0, 256, (2, 8))
    uses, *rest = without(trace(model, ids), back)
    want, *others = without(trace(nanogpt()), str)
    assert uses.pop("wpe.weight").kinds == {"shift"}  # sliced and added, not looked up
    want.pop("wpe.weight")
    assert uses == want
    assert rest == others


def test_prefixes_of_compile_and_data_parallel() -> None:
    want = trace(nanogpt())
    assert trace(torch.compile(nanogpt())) == want  # type: ignore[arg-type]
    wrapped = nanogpt()
    wrapped.h[0] = Lambda(lambda m, x: m._checkpoint_wrapped_module(x), _checkpoint_wrapped_module=wrapped.h[0])
    assert trace(wrapped) == want


def test_parametrized_weights_have_their_own_kind() -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 0.5

    model = nn.Sequential(linear(), nn.ReLU(), linear())
    nn.utils.parametrize.register_parametrization(model[0], "weight", Half())
    found = trace(model, X).uses
    (name,) = {name for name in found if name.startswith("0.") and name != "0.bias"}
    assert (found[name].kinds, found[name].contracted) == ({"matmul"}, (1,))


def test_every_expert_of_a_list_is_seen() -> None:
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Experts(16, 64)  # far more experts than tokens
        found = trace(model, torch.randn(4, 16))
        assert found.unused == ()
        assert found.uses["gate.weight"].routes
        assert found.uses["shared_gate.weight"].routes  # one number per token
        assert not found.uses["experts.7.0.weight"].routes


def test_gates_and_readouts_are_no_routers() -> None:
    glu = Lambda(lambda m, x: m.b(torch.sigmoid(m.a(x)) * m.c(x)), a=linear(), b=linear(), c=linear())
    classifier = Lambda(lambda m, x: F.softmax(m.b(x + m.a(F.relu(x))), -1), a=linear(), b=linear())
    for model in (glu, classifier):
        assert not any(use.routes for use in trace(model, X).uses.values())


def test_unused_and_frozen_parameters() -> None:
    model = Lambda(lambda m, x: m.a(x), a=linear(), b=linear(), c=linear())
    model.c.requires_grad_(False)
    found = trace(model, X)
    assert found.unused == ("b.weight", "b.bias")
    assert set(found.uses) == {"a.weight", "a.bias"}


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.last = self.linear(x) + torch.randn_like(x)
            return self.last

    model = nn.Sequential(Counts(), nn.BatchNorm1d(8), nn.Dropout(), Counts())
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    trace(model, X)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model(X)
    assert model[0].calls == 1  # control: a forward of its own does change it


def test_a_failing_forward_is_a_plan_error_and_leaves_nothing_behind() -> None:
    model = nn.Sequential(linear(), nn.Linear(9, 2)).train()
    with pytest.raises(PlanError, match="cannot be multiplied") as caught:
        trace(model, X)
    assert "example=" in str(caught.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training
    assert torch.is_grad_enabled()


def test_examples_that_cannot_be_guessed_name_the_forward() -> None:
    with pytest.raises(PlanError, match="input1, input2") as caught:
        trace(nn.Bilinear(3, 4, 5))
    assert "input1: torch.Tensor" in str(caught.value)
    with pytest.raises(PlanError, match="not a str"):
        trace(linear(), "text")
    found = trace(nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4)))
    assert set(found.uses) == {"weight", "bias"}


@pytest.mark.parametrize("example", [X, (X,), [X], {"x": X}], ids=["tensor", "tuple", "list", "dict"])
def test_examples_in_every_form(example: Any) -> None:
    model = Lambda(lambda m, x: m.a(x), a=linear())
    assert trace(model, example) == trace(model)


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_transformer_has_no_fast_path_here(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
    found = trace(layer)
    assert [set(branch.ends) for branch in found.branches] == [
        {"self_attn.out_proj.weight", "self_attn.out_proj.bias"}, {"linear2.weight", "linear2.bias"},
    ]  # fmt: skip
    (attention,) = found.attention
    assert (attention.fused, attention.scale, attention.head_size) == (True, 0.25, 16)
    assert found.uses["norm2.weight"].inside == norm_first


def test_ones_plus_a_gain_is_a_gain_that_ends_nothing() -> None:
    model = Lambda(lambda m, x: x + F.layer_norm(m.a(x), (8,)) * (1 + m.g), a=linear(), g=nn.Parameter(torch.zeros(8)))
    found = trace(model, X)
    assert found.uses["g"].kinds == {"gain"}
    assert found.uses["g"].normalised
    assert found.branches[0].ends == frozenset()  # scaling g does not scale 1 + g


class Latents(nn.Module):
    """Learned queries that read the input and then live in a stream of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.norm = nn.Parameter(torch.randn(4, 64)), nn.LayerNorm(64)
        self.q, self.kv, self.out, self.head = nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.latents.expand(x.shape[0], -1, -1)
        q, k, v = (y.unflatten(-1, (4, 16)).transpose(1, 2) for y in (self.q(self.norm(z)), *self.kv(x).chunk(2, -1)))
        z = z + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(z.mean(1))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_learned_queries_are_data(device: str) -> None:
    with torch.device(device):
        model = Latents()
    found = trace(model, torch.randn(2, 8, 64))
    assert found.uses["latents"].kinds == {"shift"}
    assert (found.uses["norm.weight"].kinds, found.uses["norm.weight"].normalised) == ({"gain"}, True)
    assert [set(branch.ends) for branch in found.branches] == [{"out.weight", "out.bias"}]
    assert found.uses["q.weight"].inside
    (attention,) = found.attention
    assert (attention.queries, attention.fused) == ({"q.weight", "q.bias"}, False)
    assert found.uses["head.weight"].after


class Hourglass(nn.Module):
    """A small U-Net: residual blocks at two resolutions, and a skip over the lower one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.down, self.up = nn.Conv2d(8, 8, 2, 2), nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a(F.silu(x))
        y = self.down(x)
        y = y + self.b(F.silu(y))
        x = self.up(y) + x
        return x + self.c(F.silu(x))


def test_a_long_skip_is_no_branch_and_breaks_no_other() -> None:
    found = trace(Hourglass(), torch.randn(2, 8, 8, 8))
    assert [set(branch.ends) for branch in found.branches] == [{f"{name}.weight", f"{name}.bias"} for name in "abc"]
    assert found.uses["up.weight"].contracted == (0,)  # the kernel does not overlap itself
    assert not found.uses["up.weight"].inside


def test_low_precision_models() -> None:
    assert trace(nanogpt().bfloat16()) == trace(nanogpt())
    assert trace(llama().bfloat16()) == trace(llama())


def test_isoscales_own_decoder() -> None:
    found = trace(Decoder(DecoderConfig(vocab=64, width=32, depth=2, head_size=16)))
    assert [set(branch.ends) for branch in found.branches] == [
        {f"blocks.{i}.{end}.weight"} for i in (0, 1) for end in ("attn.out", "mlp.down")
    ]
    assert found.uses["head.weight"].after


def test_recurrent_layers() -> None:
    uses = trace(nn.LSTM(8, 8), torch.randn(3, 2, 8)).uses
    assert uses["weight_hh_l0"].kinds == {"matmul"}
    assert uses["weight_hh_l0"].contracted == (1,)


def test_transition_blocks_of_a_resnet_are_no_branches() -> None:
    found = trace(resnet(16, 1))  # two blocks, the second projects its skip
    assert len(found.branches) == 1
    assert {name for name, use in found.uses.items() if use.after} == {"fc.weight", "fc.bias"}
    assert not found.uses["blocks.1.conv2.weight"].inside


def test_a_seventy_billion_parameter_model_is_traced_on_the_meta_device() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128256,
        ))  # fmt: skip
    found = trace(model)
    assert len(found.branches) == 160
    assert len(found.attention) == 80
