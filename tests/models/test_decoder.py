"""The decoder equals decoders written out by hand, in both scalings, with every option."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoder_reference import peer_loss, plain_logits, unit_loss
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from isoscale.models import Decoder, DecoderConfig

torch.set_num_threads(1)

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped heads": {"kv_heads": 2},
    "one key head": {"kv_heads": 1},
    "qk_norm": {"qk_norm": True},
    "trainable norms": {"norm": "trainable", "qk_norm": True},
    "tied": {"tied": True},
    "alphas": {
        "alpha_attn": 2.0,
        "alpha_ffn_act": 0.5,
        "alpha_res": 0.7,
        "alpha_res_attn_ratio": 0.25,
        "alpha_loss": 1.5,
    },
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def small(**options: Any) -> Decoder:
    model = Decoder(DecoderConfig(vocab=31, width=32, depth=2, head_size=8, **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.add_(0.3 * torch.randn_like(p))
    return model


def batch(length: int = 12) -> tuple[Tensor, Tensor]:
    text = torch.randint(0, 31, (3, length + 1))
    targets = text[:, 1:].clone()
    targets[0, -3:] = -100
    return text[:, :-1], targets


def grads_of(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def assert_same_grads(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "alphas"])
def test_plain_twin_is_plain_torch(name: str) -> None:
    model, (ids, targets) = small(scaling="plain", **OPTIONS[name]).double(), batch()
    logits = model(ids)
    want = plain_logits(model, ids)
    # the tables of RoPE are float32 by design
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-6)
    loss = model(ids, targets)
    want_loss = torch.nn.functional.cross_entropy(want.flatten(0, 1), targets.flatten())
    assert_same_grads(grads_of(model, loss), grads_of(model, want_loss), 1e-4, 1e-6)


def nodes_of(loss: Tensor) -> set[str]:
    found, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack += [edge for edge, _ in node.next_functions]
    return {type(node).__name__ for node in found}


def test_plain_twin_has_no_custom_autograd_nodes() -> None:
    ids, targets = batch()
    plain, unit = (nodes_of(small(scaling=scaling)(ids, targets)) for scaling in ("plain", "unit"))
    assert not [name for name in plain if name.startswith("_")]
    assert [name for name in unit if name.startswith("_Linear")]  # the control


@pytest.mark.parametrize("name", list(OPTIONS))
def test_unit_decoder_is_the_unfolded_composition(name: str) -> None:
    model, (ids, targets) = small(**OPTIONS[name]).double(), batch()
    loss, want = model(ids, targets), unit_loss(model, ids, targets)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-7)
    assert_same_grads(grads_of(model, loss), grads_of(model, want), 1e-5, 1e-5)


def test_unit_decoder_against_unit_scaling() -> None:
    uu = pytest.importorskip("unit_scaling")
    pytest.importorskip("unit_scaling.functional")
    model, (ids, targets) = small(**OPTIONS["alphas"]).double(), batch()
    targets[targets == -100] = 0  # it averages over padding
    loss, want = model(ids, targets), peer_loss(model, ids, targets, uu)
    torch.testing.assert_close(loss, want.to(loss), rtol=1e-6, atol=1e-7)
    assert_same_grads(grads_of(model, loss), grads_of(model, want), 1e-4, 1e-4)


@pytest.mark.parametrize("scaling", ["unit", "plain"])
def test_probe_sees_every_site_and_changes_nothing(scaling: str) -> None:
    model, (ids, targets) = small(scaling=scaling, kv_heads=2).double(), batch()
    seen: list[tuple[str, str, Tensor, float]] = []
    loss = model(ids, targets, probe=lambda *call: seen.append(call))
    assert [(site.path, site.port) for site in model.sites()] == [call[:2] for call in seen]
    torch.testing.assert_close(loss, model(ids, targets))
    assert_same_grads(grads_of(model, loss), grads_of(model, model(ids, targets)), 1e-9, 1e-9)
    for site in model.sites():
        assert site.attr is None or isinstance(getattr(model.get_submodule(site.path), site.attr), float)
    for path, port, value, factor in seen:
        assert isinstance(factor, float)
        assert value.requires_grad or port == "logits", (path, port)


def test_logical_values_are_at_unit_scale() -> None:
    model = Decoder(DecoderConfig(vocab=64, width=128, depth=2, head_size=32))
    ids = torch.randint(0, 64, (8, 64))
    scales: dict[tuple[str, str], float] = {}
    model(ids, ids, probe=lambda p, q, v, f: scales.update({(p, q): (v * f).square().mean().sqrt().item()}))
    for (path, port), value in scales.items():
        # The attention factor takes values of different positions as independent; after the first block, which
        # averages over positions, they are not, and attention outputs grow above 1. Known, and the same in every peer.
        top = 3.0 if path.startswith("blocks.1.attn") or port.endswith("residual") else 1.3
        want = {"logits": 32**-0.5, "loss_logits": 128**-0.5}.get(port, 128**-0.5 if path == "head" else 1.0)
        assert 0.8 < value / want < top, (path, port, value)


def test_multipliers_are_settable_attributes() -> None:
    model, (ids, targets) = small(), batch()
    before = model(ids, targets).item()
    for site in model.sites():
        if site.attr is not None:
            owner = model.get_submodule(site.path)
            old = getattr(owner, site.attr)
            setattr(owner, site.attr, 1.5 * old)
            changed = model(ids, targets).item()
            setattr(owner, site.attr, old)
            if site.kind != "embedding":  # the first norm and the first skip see it, the value moves little
                assert abs(changed - before) > 1e-7, site
    assert model(ids, targets).item() == before


@pytest.mark.parametrize("scaling", ["unit", "plain"])
def test_head_and_embedding_multiplier(scaling: str) -> None:
    model, (ids, _) = small(scaling=scaling), batch()
    logits = model(ids)
    model.head.multiplier = 0.25
    torch.testing.assert_close(model(ids), 0.25 * logits)
    seen: dict[str, Tensor] = {}
    model.embed.multiplier = 3.0
    model(ids, probe=lambda p, q, v, f: seen.setdefault(p, v))
    torch.testing.assert_close(seen["embed"], 3.0 * model.embed.weight[ids])


@pytest.mark.parametrize("scaling", ["unit", "plain"])
def test_later_tokens_never_change_earlier_logits(scaling: str) -> None:
    model, (ids, _) = small(scaling=scaling, kv_heads=2), batch()
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 31
    one, two = model(ids), model(other)
    assert torch.equal(one[:, :7], two[:, :7])
    assert not torch.equal(one[:, 7:], two[:, 7:])


def test_meta_device_and_to_empty() -> None:
    with torch.device("meta"):
        model = Decoder(DecoderConfig(norm="trainable", qk_norm=True, tied=True))
    model.to_empty(device="cpu").reset_parameters()
    loss = model(torch.randint(0, 256, (2, 8)), torch.randint(0, 256, (2, 8)))
    assert 5 < loss.item() < 6.5
    assert torch.equal(model.norm.weight, torch.ones(64))
    assert model.embed.weight.std().item() == pytest.approx(1, abs=0.05)


def test_tied_model_has_one_table() -> None:
    assert "head.weight" not in dict(small(tied=True).named_parameters())
    assert "head.weight" in dict(small().named_parameters())


def test_tokens_scale_weight_gradients_only() -> None:
    model, (ids, targets) = small(norm="trainable", qk_norm=True), batch()
    local = grads_of(model, model(ids, targets))
    told = grads_of(model, model(ids, targets, tokens=4 * ids.numel()))
    assert_same_grads(told, {name: grad / 2 for name, grad in local.items()}, 1e-5, 1e-6)


def test_accumulated_micro_batches_equal_one_batch() -> None:
    """With the global token count, sums over micro batches are the gradients of the whole."""
    model, (ids, _) = small(), batch()
    targets = ids.roll(1, 1)
    whole = grads_of(model, model(ids, targets))
    parts = [grads_of(model, model(row[None], goal[None], tokens=ids.numel())) for row, goal in zip(ids, targets)]
    assert_same_grads({name: sum(part[name] for part in parts) for name in whole}, whole, 1e-4, 1e-5)


@pytest.mark.parametrize("scaling", ["unit", "plain"])
def test_dropout(scaling: str) -> None:
    model, (ids, _) = small(scaling=scaling, dropout=0.2), batch()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_deepcopy_and_state_dict() -> None:
    model, (ids, _) = small(kv_heads=2), batch()
    again = small(kv_heads=2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids), model(ids))
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["unit", "plain"])
@pytest.mark.parametrize(("dynamic", "more"), [(True, 0), (None, 1)])
def test_compiles_as_one_graph_for_all_sizes(scaling: str, dynamic: bool | None, more: int) -> None:
    model = Decoder(DecoderConfig(vocab=31, width=32, depth=1, head_size=8, scaling=scaling, kv_heads=2))
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    first = 0
    for length in (12, 14, 19):
        ids, targets = batch(length)
        loss, want = fast(ids, targets), model(ids, targets)
        torch.testing.assert_close(loss, want)
        assert_same_grads(grads_of(model, loss), grads_of(model, want), 1e-3, 1e-4)
        first = first or counter.frame_count
    assert counter.frame_count <= first + more


@pytest.mark.parametrize("scaling", ["unit", "plain"])
def test_bf16_and_autocast(scaling: str) -> None:
    model, (ids, targets) = small(scaling=scaling), batch()
    want = model(ids, targets)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids, targets)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(want.item(), rel=0.02)
    for name, grad in grads_of(model, low).items():
        assert grad.dtype == torch.float32, name
    assert model.bfloat16()(ids, targets).item() == pytest.approx(want.item(), rel=0.02)


def test_functional_call_per_sample_gradients() -> None:
    """torch.func over the whole model: vmap of grad equals one backward per sample."""
    model, (ids, _) = small(), batch()
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (row[None], row[None].roll(1, 1)))

    with pytest.warns(UserWarning, match="performance drop"):
        got = torch.vmap(torch.func.grad(loss), (None, 0))(weights, ids)
    for index, row in enumerate(ids):
        want = grads_of(model, model(row[None], row[None].roll(1, 1)))
        assert_same_grads({name: grad[index] for name, grad in got.items()}, want, 1e-3, 1e-4)
