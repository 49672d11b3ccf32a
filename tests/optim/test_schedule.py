"""LR schedules: pure, from above zero to the peak to the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoscale._base.errors import ConfigError
from isoscale.optim import lr_factor
from isoscale.optim.schedule import KINDS


def line(kind, steps=100, **settings):
    return [lr_factor(step, steps, kind=kind, **settings) for step in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_in_equal_steps_to_the_peak(kind):
    values = line(kind, warmup=0.1)
    assert values[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(values) == 1.0
    assert line(kind, warmup=0.0)[0] == 1.0
    assert line(kind, warmup=1.0)[-1] == 1.0


@pytest.mark.parametrize(("kind", "last"), [("cosine", 0.05), ("linear", 0.05), ("wsd", 0.05), ("constant", 1.0)])
def test_ends(kind, last):
    assert line(kind, final=0.05)[-1] == pytest.approx(last)
    assert line(kind, final=0.0)[-1] == pytest.approx(0.0 if kind != "constant" else 1.0)


def test_shapes():
    assert line("cosine", 101, warmup=0.0, final=0.0)[50] == pytest.approx(0.5)
    assert line("linear", 101, warmup=0.0, final=0.0)[25] == pytest.approx(0.75)
    wsd = line("wsd", warmup=0.1, decay_share=0.2, final=0.0)
    assert wsd[10:81] == [1.0] * 71
    assert wsd[90] == pytest.approx(1 - 10 / 19)


@given(st.sampled_from(KINDS), st.integers(1, 300), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.data())
def test_always_between_0_and_1_never_rising_after_the_peak_and_pure(kind, steps, warmup, final, share, data):
    settings = {"kind": kind, "warmup": warmup, "final": final, "decay_share": share}
    step = data.draw(st.integers(0, steps - 1))
    value = lr_factor(step, steps, **settings)
    assert 0 <= value <= 1
    assert value == lr_factor(step, steps, **settings)
    if round(warmup * steps) <= step < steps - 1:
        assert lr_factor(step + 1, steps, **settings) <= value


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(ConfigError) as error:
        lr_factor(0, 10, kind="cosin")
    assert "cosine" in error.value.hint
