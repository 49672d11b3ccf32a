"""What a user does with a scaled tensor: arithmetic, views and writes, saving, mixing, and what is refused."""

import copy
import io

import pytest
import torch
from torch import nn

from isoscale import scalify as sc
from isoscale._base.errors import ConfigError
from isoscale.scalify.errors import RuleError


def close(x, value, tolerance=1e-12):
    return (sc.as_plain(x.detach(), torch.float64) - value).norm() <= tolerance * value.norm()


@pytest.fixture
def x():
    return torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-9


def test_a_value_goes_in_and_comes_out_where_plain_fp16_loses_it(x):
    scaled = sc.as_scaled(x, dtype=torch.float16)
    assert scaled.dtype == torch.float16
    assert close(scaled, x, 1e-3)
    assert x.half().count_nonzero() == 0  # the control
    assert 0.5 < scaled.data_part.double().square().mean().sqrt() < 2


def test_a_given_scale_is_used_and_one_that_is_no_power_of_two_is_refused_with_the_nearest(x):
    assert float(sc.as_scaled(x, scale=2.0**-30).scale) == 2.0**-30
    with pytest.raises(ConfigError, match="power of two") as caught:
        sc.as_scaled(x, scale=3)
    assert "nearest is 4" in str(caught.value)
    with pytest.raises(ConfigError, match="power of two"):
        sc.as_scaled(x, scale=-1.0)


def test_repr_shows_the_scale_and_the_rms_of_the_data(x):
    shown = repr(sc.as_scaled(x, scale=2.0**-30))
    assert "scale=2^-30" in shown
    assert "data rms=" in shown
    assert "scale=any" in repr(sc.as_scaled(torch.zeros(3)))


def test_integers_booleans_and_scaled_tensors_pass_through_as_scaled():
    for plain in (torch.arange(3), torch.tensor([True])):
        assert sc.as_scaled(plain) is plain
    scaled = sc.as_scaled(torch.ones(2))
    assert sc.as_scaled(scaled) is scaled


def test_gradients_flow_through_as_scaled_and_as_plain(x):
    leaf = x.clone().requires_grad_()
    (sc.as_plain(sc.as_scaled(leaf) * 3.0) * x).sum().backward()
    assert torch.allclose(leaf.grad, 3 * x, rtol=1e-12, atol=0)


def test_a_write_into_a_whole_tensor_moves_its_scale_and_every_whole_view_follows(x):
    scaled = sc.as_scaled(x)
    view = scaled.view(48)
    view.mul_(4096.0)
    assert close(scaled, x * 4096)
    assert scaled.scale is view.scale


def test_a_write_through_a_view_of_a_part_leaves_the_rest_right(x):
    scaled = sc.as_scaled(x)
    before = float(scaled.scale)
    scaled[0].mul_(4096.0)
    scaled[2:4, 1].copy_(torch.full((2,), 7.0))
    want = x.clone()
    want[0] *= 4096
    want[2:4, 1] = 7.0
    assert float(scaled.scale) == before
    assert close(scaled, want)


def test_a_part_of_zeros_adopts_the_scale_of_what_is_written(x):
    zeros = torch.zeros_like(sc.as_scaled(x, dtype=torch.float16))
    assert float(zeros.scale) == 0
    zeros[1] += sc.as_scaled(x[1], dtype=torch.float16)
    want = torch.zeros_like(x)
    want[1] = x[1]
    assert close(zeros, want, 1e-3)


def test_results_that_are_no_views_never_share_a_scale(x):
    scaled = sc.as_scaled(x)
    for other in (-scaled, scaled.relu(), scaled.clone(), scaled.abs(), sc.rescale_l2(scaled)):
        assert other.scale is not scaled.scale
        other.mul_(4.0)
        assert close(scaled, x)


def test_in_place_and_out_forms_write(x):
    scaled = sc.as_scaled(x)
    scaled.add_(1e-9).mul_(2.0).clamp_(min=0.0)
    assert close(scaled, (x + 1e-9).mul(2).clamp(min=0))
    out = sc.as_scaled(torch.empty_like(x))
    torch.add(sc.as_scaled(x), sc.as_scaled(x * 8), out=out)
    assert close(out, 9 * x)


def test_foreach_operators_work_element_by_element(x):
    a, b = [sc.as_scaled(x), sc.as_scaled(x[0])], [sc.as_scaled(x * 2), sc.as_scaled(x[0] * 5)]
    torch._foreach_add_(a, b, alpha=2.0)
    assert close(a[0], 5 * x)
    assert close(a[1], 11 * x[0])
    torch._foreach_addcmul_(a, b, b, 0.5)
    assert close(a[0], 5 * x + 2 * x * x)
    norms = torch._foreach_norm(b)
    assert abs(float(norms[0].detach()) / float((2 * x).norm()) - 1) < 1e-6


def test_plain_and_scaled_tensors_mix_at_scale_one(x):
    plain = torch.randn_like(x)
    assert close(sc.as_scaled(x) + plain, x + plain)
    assert close(plain * sc.as_scaled(x), plain * x)
    target = plain.clone()
    target.add_(sc.as_scaled(x * 1e9))
    assert type(target) is torch.Tensor
    assert torch.allclose(target, plain + x * 1e9)


def test_an_operator_without_a_rule_is_named_with_the_line_and_the_ways_out(x):
    with pytest.raises(RuleError) as caught:
        torch.special.bessel_j0(sc.as_scaled(x))
    text = str(caught.value)
    assert "aten.special_bessel_j0.default has no scale rule" in text
    assert "test_scaled_tensor.py" in text
    assert "torch.special.bessel_j0(sc.as_scaled(x))" in text
    for way in ("@iso.scalify.rule", "stop_scaling", 'fallback=("aten.special_bessel_j0.default",)', "did you mean"):
        assert way in text


def test_a_writing_operator_without_a_rule_is_refused_and_changes_nothing(x):
    scaled = sc.as_scaled(x)
    with pytest.raises(RuleError, match="writes into a scaled tensor"):
        scaled.geometric_(0.5)
    assert close(scaled, x)
    p = nn.Parameter(sc.as_scaled(x.float()))
    p.grad = sc.as_scaled(x.float())
    fused = torch.optim.AdamW([p], fused=True)
    with pytest.raises(RuleError, match="writes into a scaled tensor"):  # it would miss its target
        fused.step()


def test_a_fallback_is_opted_in_counted_and_warned_of(x):
    scaled = sc.as_scaled(x * 1e9, fallback=("aten.special_bessel_j0.default",))
    with pytest.warns(UserWarning, match="special_bessel_j0"):
        y = torch.special.bessel_j0(scaled * 2.0)
    assert close(y, torch.special.bessel_j0(x * 2e9), 1e-6)
    assert y._options.counts["aten.special_bessel_j0.default"] == 1


def test_control_flow_on_values_works_eagerly_and_comparisons_give_plain_booleans(x):
    scaled = sc.as_scaled(x.abs())
    assert bool(scaled.sum() > 0)
    assert type(scaled > 1e-9) is torch.Tensor
    assert torch.equal(scaled > 1e-9, x.abs() > 1e-9)


def test_nan_and_infinite_data_stay_what_they_are():
    plain = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    scaled = sc.as_scaled(plain)
    assert torch.equal(torch.isnan(sc.as_plain(scaled)), torch.isnan(plain))
    assert torch.equal(sc.as_plain(scaled * 2.0)[2:], plain[2:])
    assert torch.isnan(sc.as_plain(scaled.sum()))


def test_masked_softmax_with_minus_infinity_is_torchs():
    scores = torch.randn(3, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    want = scores.masked_fill(mask, -torch.inf).softmax(-1)
    for scaled in (sc.as_scaled(scores), sc.as_scaled(scores, scale=2.0**-20)):
        got = sc.as_plain(scaled.masked_fill(mask, -torch.inf).softmax(-1))
        assert torch.allclose(got, want, atol=1e-6)
        added = sc.as_plain((scaled + torch.zeros(3, 5).masked_fill(mask, -torch.inf)).softmax(-1))
        assert torch.allclose(added, want, atol=1e-6)


def test_double_backward(x):
    leaf = sc.as_scaled(x).requires_grad_()
    (grad,) = torch.autograd.grad((leaf**3).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), leaf)
    assert close(second, 6 * x)


def test_hooks_see_scaled_gradients(x):
    leaf, seen = sc.as_scaled(x).requires_grad_(), []
    leaf.register_hook(lambda g: seen.append(type(g)) or g * 2.0)
    (leaf * 3.0).sum().backward()
    assert seen == [sc.ScaledTensor]
    assert close(leaf.grad, torch.full_like(x, 6.0))


def test_a_parameter_is_edited_under_no_grad(x):
    p = nn.Parameter(sc.as_scaled(x))
    with torch.no_grad():
        p.mul_(0.5)
        p[0] = 0.0
        p.add_(torch.ones(8, dtype=torch.float64) * 1e-9)
    want = x * 0.5
    want[0] = 0
    assert close(p, want + 1e-9)
    nn.init.normal_(p, std=1e-7)
    assert 0.5e-7 < float(sc.as_plain(p.detach()).std()) < 2e-7


def test_clip_grad_norm(x):
    p, plain = nn.Parameter(sc.as_scaled(x)), nn.Parameter(x.clone())
    p.grad, plain.grad = sc.as_scaled(x * 1e9), x * 1e9
    norms = [float(nn.utils.clip_grad_norm_([one], 0.01)) for one in (p, plain)]
    assert abs(norms[0] / norms[1] - 1) < 1e-6
    assert close(p.grad, plain.grad, 1e-6)
    assert norms[1] > 0.01 > float(plain.grad.norm()) * 0.999


def test_deepcopy_and_torch_save_without_unpickling_code(x):
    p = nn.Parameter(sc.as_scaled(x, dtype=torch.float16))
    for other in (copy.deepcopy(p), _saved(p)):
        assert isinstance(other, sc.ScaledTensor)
        assert torch.equal(other.data_part, p.data_part)
        assert torch.equal(other.scale, p.scale)
        assert other.scale is not p.scale


def _saved(p):
    buffer = io.BytesIO()
    torch.save(p.detach(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_to_changes_the_data_and_keeps_the_scale(x):
    scaled = sc.as_scaled(x)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        other = scaled.to(dtype)
        assert other.dtype == dtype
        assert float(other.scale) == float(scaled.scale)


def test_inference_mode(x):
    layer, _ = sc.scalify(nn.Linear(8, 3), None, "float32")
    with torch.inference_mode():
        inside = layer(x.float())
    with torch.no_grad():
        outside = layer(x.float())
    assert torch.equal(sc.as_plain(inside), sc.as_plain(outside))


@pytest.mark.parametrize("value", [-1e4, -1e9, torch.finfo(torch.float16).min, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("scale", [1.0, 2.0**-10, 2.0**-18])
def test_finite_masks_mask_under_every_scale_in_fp16(value, scale):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * scale
    mask = torch.ones(4, 6, dtype=torch.bool).triu(1)
    want = x.masked_fill(mask, value).softmax(-1)
    scores = sc.as_scaled(x, scale=scale, dtype=torch.float16)
    assert torch.allclose(sc.as_plain(scores.masked_fill(mask, value).softmax(-1), torch.float32), want, atol=1e-3)
    chosen = torch.where(mask, torch.tensor(value), scores).softmax(-1)
    assert torch.allclose(sc.as_plain(chosen, torch.float32), want, atol=1e-3)
