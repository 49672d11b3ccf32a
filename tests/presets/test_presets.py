"""Every preset is a full config that can be planned."""

import pytest

from isoscale import presets
from isoscale._base.errors import ConfigError
from isoscale.train.setup import meta_plan


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_can_be_planned_and_is_the_same_each_time(name):
    config = presets.by_name(name)
    assert config == presets.by_name(name)
    made = meta_plan(config)
    assert made.parametrisation == config.rules.parametrisation
    assert made.recipe == config.numerics.recipe


def test_the_target_is_the_proxy_but_for_width_and_recipe():
    from isoscale.train.folder import differences

    found = differences(presets.target(), presets.proxy().model_dump(mode="json"))
    assert set(found) == {"model.width", "numerics.recipe"}
    assert presets.target().model.width == 4 * presets.proxy().model.width


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ConfigError) as error:
        presets.by_name("proxi")
    assert error.value.hint == "did you mean proxy?"
