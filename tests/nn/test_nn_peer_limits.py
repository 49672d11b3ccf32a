"""What unit-scaling 0.3.5 gets wrong or lacks, right here; one test each."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as torch_f
from nn_claims import n, rms, run

from isoscale import nn as iso
from isoscale._base.errors import ConfigError
from isoscale.nn import functional as F
from isoscale.nn.attention import rope_tables, sdpa_factor
from isoscale.nn.factors import attention_factor, symbolic_log


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_length_one_returns_the_value(causal: bool) -> None:
    q, k, v = (n(2, 3, 1, 8) for _ in range(3))
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, is_causal=causal), v)
    assert attention_factor(1.0, 8, 1, causal) == 1.0


def test_attention_factor_can_be_held_while_a_cache_grows() -> None:
    q = n(1, 2, 1, 8)
    factors = {sdpa_factor(q, n(1, 2, keys, 8), scale=1 / 8, is_causal=True, length=64) for keys in (3, 17, 64)}
    assert len(factors) == 1
    assert factors.pop() == attention_factor(1.0, 8, 64, True)


def test_cached_decoding_equals_the_full_pass() -> None:
    q, k, v = (n(1, 2, 16, 8) for _ in range(3))
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    raw = torch_f.scaled_dot_product_attention(q[..., 9:10, :], k[..., :10, :], v[..., :10, :], scale=1 / 8)
    held = sdpa_factor(q[..., 9:10, :], k[..., :10, :], scale=1 / 8, is_causal=True, length=16)
    torch.testing.assert_close(raw * held, full[..., 9:10, :])


def test_attention_with_explicit_scale_and_grouped_heads() -> None:
    q, k, v = n(2, 4, 5, 8), n(2, 2, 5, 8), n(2, 2, 5, 8)
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    out = F.scaled_dot_product_attention(q, k, v, scale=0.3, is_causal=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, *wide, mult=0.3 * 8, is_causal=True))
    with pytest.raises(ConfigError, match="key heads"):
        F.scaled_dot_product_attention(q, n(2, 3, 5, 8), n(2, 3, 5, 8))


def test_symbolic_log_is_the_logarithm() -> None:
    for size in (2, 3, 17, 1024, 131072, 10_000_000):
        assert symbolic_log(size) == pytest.approx(math.log(size), rel=5e-9)


def test_padding_does_not_lower_the_loss() -> None:
    logits, targets = n(4, 6, 9), torch.randint(0, 9, (4, 6))
    targets[:, 3:] = -100
    want = torch_f.cross_entropy(logits[:, :3].reshape(-1, 9), targets[:, :3].reshape(-1))
    torch.testing.assert_close(F.cross_entropy(logits, targets), want)
    leaf = logits.clone().requires_grad_()
    F.cross_entropy(leaf, targets).backward()
    assert leaf.grad is not None
    assert leaf.grad[:, 3:].abs().max() == 0
    part = logits[:, :3].clone().requires_grad_()
    F.cross_entropy(part, targets[:, :3]).backward()
    torch.testing.assert_close(leaf.grad[:, :3], part.grad)  # padding changes no real gradient either


def test_all_padding_is_zero_not_nan() -> None:
    leaf = n(2, 9).requires_grad_()
    loss = F.cross_entropy(leaf, torch.full((2,), -100))
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad is not None
    assert rms(leaf.grad) == 0


def test_label_smoothing() -> None:
    logits, targets = n(6, 9), torch.randint(0, 9, (6,))
    want = torch_f.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, targets, label_smoothing=0.1), want)


@pytest.mark.parametrize("make", [iso.Conv1d, iso.Conv2d])
def test_conv_modules_obey_their_constraint(make: type[iso.Conv1d]) -> None:
    x = n(2, 4, 9) if make is iso.Conv1d else n(2, 4, 9, 9)
    tied = make(4, 16, 3)
    free = make(4, 16, 3, constraint=None)
    free.load_state_dict(tied.state_dict())
    (out, (dx,)), (free_out, (free_dx,)) = run(tied, x), run(free, x)
    torch.testing.assert_close(out, free_out)
    ratio = free.factors().input_grad / tied.factors().input_grad
    assert ratio == pytest.approx(0.5)
    torch.testing.assert_close(free_dx, ratio * dx)


def test_low_precision_input_keeps_its_size() -> None:
    assert F.rms_norm(n(2, 8).bfloat16(), 8).shape == (2, 8)


def test_empty_batch() -> None:
    for op in (lambda x: F.linear(x, n(3, 8)), lambda x: F.rms_norm(x, 8)):
        out, (dx,) = run(op, n(0, 8))
        assert out.shape[0] == dx.shape[0] == 0
    with pytest.raises(ConfigError, match="two classes"):
        F.cross_entropy(n(3, 1), torch.zeros(3, dtype=torch.long))


def test_parameters_carry_no_attributes_and_survive_everything() -> None:
    layer = iso.Linear(4, 3, bias=True)
    assert all(not vars(p) for p in layer.parameters())
    assert dict(layer.roles) == {"weight": "hidden", "bias": "bias"}
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.roles == layer.roles
        assert again.factors(10) == layer.factors(10)
    with torch.device("meta"):
        empty = iso.Linear(4, 3, bias=True)
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = n(2, 4)
    torch.testing.assert_close(empty(x), layer(x))


def test_unknown_constraint_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="to_output_scale"):
        iso.Linear(4, 3, constraint="to_output_scael")
    with pytest.raises(ConfigError, match="fits every op"):
        F.linear(n(2, 4), n(3, 4), constraint="to_left_grad_scale")
    with pytest.raises(ConfigError, match="multiplier"):
        F.gelu(n(3), mult=0.0)


def test_rope_is_relative() -> None:
    cos, sin = rope_tables(32, 16)
    q, k = n(16), n(16)
    turned_q, turned_k = F.apply_rope(q.expand(32, 16), cos, sin), F.apply_rope(k.expand(32, 16), cos, sin)
    scores = turned_q @ turned_k.t()
    for offset in (0, 5):
        line = torch.diagonal(scores, offset)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-4)
    assert rms(turned_q) == pytest.approx(rms(q), rel=1e-5)
    with pytest.raises(ConfigError, match="even"):
        rope_tables(4, 3)
