"""Rescales, casts of data, ways in and out, and the modules that hold them."""

import pytest
import torch
from torch import nn

from isoscale import scalify as sc
from isoscale._base.errors import ConfigError
from isoscale.formats import fake_cast


def leaf(scale=1.0, size=1e-5, dtype=torch.float32):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * size
    return sc.as_scaled(x, scale=scale, dtype=dtype).requires_grad_()


def rms(x):
    return float(x.data_part.detach().double().square().mean().sqrt())


@pytest.mark.parametrize("statistic", ["l2", "l1", "max"])
def test_a_rescale_moves_the_statistic_into_the_scale_exactly(statistic):
    x = leaf()
    y = sc.rescale(x, statistic)
    assert torch.equal(sc.as_plain(y.detach()), sc.as_plain(x.detach()))
    data = y.data_part.detach()
    found = {"l2": data.square().mean().sqrt(), "l1": data.abs().mean(), "max": data.abs().amax()}[statistic]
    assert 1 <= float(found) < 2
    assert rms(x) < 1e-4  # the control: it was not there before
    y.backward(torch.ones_like(y))
    assert torch.equal(sc.as_plain(x.grad), torch.ones(64, 32))


@pytest.mark.parametrize("name", ["l2", "l1", "max"])
def test_a_gradient_rescale_leaves_the_value_and_moves_the_gradients_scale(name):
    x = leaf()
    y = getattr(sc, f"rescale_{name}_grad")(x)
    assert torch.equal(y.data_part, x.data_part)
    draw = torch.Generator().manual_seed(0)
    g = sc.as_scaled(torch.randn(64, 32, generator=draw) * 1e-6, scale=1.0)
    y.backward(g)
    assert torch.equal(sc.as_plain(x.grad), sc.as_plain(g))
    plain = sc.as_plain(g)
    unit = {"l2": 1.0, "l1": rms(g) / float(plain.abs().mean()), "max": rms(g) / float(plain.abs().max())}[name]
    assert 0.999 < rms(x.grad) / unit < 2  # the scale is the power of two at or below the statistic
    assert rms(g) < 1e-5


def test_zeros_and_data_that_are_not_finite_are_left_alone():
    for data in (torch.zeros(4), torch.tensor([1.0, float("inf"), 2.0, 3.0]), torch.empty(0)):
        x = sc.as_scaled(data, scale=4.0)
        y = sc.rescale_l2(x)
        assert float(y.scale) == 4.0
        assert torch.equal(y.data_part, x.data_part)


def test_plain_tensors_are_returned_as_they_are():
    x = torch.randn(3)
    assert sc.rescale_l2(x) is x
    assert sc.rescale_l2_grad(x) is x
    assert sc.set_scaling(x, 2.0) is x


def test_an_unknown_statistic_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="no such statistic") as caught:
        sc.rescale(leaf(), "l3")
    assert "l2" in str(caught.value)


def test_casts_act_on_the_data_forward_and_on_the_gradients_data_backward():
    x = leaf(2.0**-17)
    y = sc.cast_on_backward(sc.cast_on_forward(x, "e4m3"), "e5m2")
    assert torch.equal(y.data_part.detach(), fake_cast(x.data_part.detach(), "e4m3"))
    assert not torch.equal(y.data_part, x.data_part)
    g = sc.as_scaled(torch.randn(64, 32) * 1e-7)
    y.backward(g)
    assert torch.equal(x.grad.data_part, fake_cast(g.data_part, "e5m2"))
    plain = fake_cast(sc.as_plain(x.detach()), "e4m3")
    assert plain.count_nonzero() == 0  # the control: E4M3 without a scale loses all of it
    with pytest.raises(ConfigError):
        sc.cast_on_forward(x, "e9m9")


def test_set_scaling_keeps_the_value_and_refuses_what_is_no_power_of_two():
    x = leaf()
    y = sc.set_scaling(x, 2.0**-20)
    assert float(y.scale) == 2.0**-20
    assert torch.equal(sc.as_plain(y.detach()), sc.as_plain(x.detach()))
    with pytest.raises(ConfigError, match="power of two"):
        sc.set_scaling(x, 0.3)


def test_stop_scaling_gives_the_plain_value_and_its_gradient_comes_back_scaled():
    x = leaf(2.0**-17, dtype=torch.float16)
    y = sc.stop_scaling(x)
    assert type(y) is torch.Tensor
    assert y.dtype == torch.float32
    g = torch.randn(64, 32) * 1e-9
    y.backward(g)
    assert x.grad.dtype == torch.float16
    assert 0.4 < rms(x.grad) < 2.1
    assert torch.allclose(sc.as_plain(x.grad, torch.float32), g, rtol=1e-3, atol=1e-13)


def test_a_rescale_module_keeps_its_period_and_shows_it():
    step = sc.Rescale("max", "forward", period=3)
    assert "max, forward, period=3" in repr(nn.Sequential(step))
    scales = [float(step(leaf()).scale) for _ in range(6)]
    assert [s != 1.0 for s in scales] == [True, False, False, True, False, False]
    step.eval()
    count = int(step.calls)
    step(leaf())
    assert int(step.calls) == count
    assert not step.state_dict()
    for settings in ({"direction": "up"}, {"period": 0}, {"statistic": "l9"}):
        with pytest.raises(ConfigError):
            sc.Rescale(**settings)


def test_rescales_are_placed_listed_and_taken_away():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    names = list(model.state_dict())
    sc.place(model, "1", "l1", period=2)
    assert "(rescale): Rescale(l1, backward, period=2)" in repr(model)
    sc.place(model, "0", direction="forward")
    assert sorted(sc.placements(model)) == ["0", "1"]
    assert list(model.state_dict()) == names
    sc.take_away(model, "1")
    assert sorted(sc.placements(model)) == ["0"]
    with pytest.raises(ConfigError, match="no rescale stands there"):
        sc.take_away(model, "1")
    with pytest.raises(ConfigError, match="no such module"):
        sc.place(model, "2")
    sc.place(model, "0", direction="forward", output=True)
    assert sorted(sc.placements(model)) == ["0", "0 output"]
    sc.take_away(model, "0", output=True)
    assert sorted(sc.placements(model)) == ["0"]
    sc.place(model, "0", direction="forward", period=5)  # takes the place, does not pile up
    assert sc.placements(model)["0"].period == 5
    assert len(model[0]._forward_pre_hooks) == 1
