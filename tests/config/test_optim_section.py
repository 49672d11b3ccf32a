"""The optimiser's section: names, LMD's own settings, defaults that are the optimiser's."""

import pytest

from isoscale._base.errors import ConfigError
from isoscale.config import HpsSection, OptimSection, RunConfig, build, load
from isoscale.rules import FAMILIES
from isoscale.rules.table import HP_DEFAULTS
from isoscale.train.setup import meta_plan, resolved


def test_every_family_can_be_asked_for_and_the_defaults_are_the_rules():
    assert set(OptimSection.model_fields["name"].annotation.__args__) == set(FAMILIES)
    assert HpsSection().model_dump() == dict(HP_DEFAULTS)


@pytest.mark.parametrize(("text", "hint"), [
    ("optim.name=lmdd", "did you mean 'lmd'?"), ("optim.name=madm", "did you mean 'madam'?"),
    ("optim.name=adam", "did you mean 'adamw'?"), ("optim.form=splt", "did you mean 'split'?"), ("optim.nme=lmd", "did you mean optim.name"),
    ("train.optimizer=lmd", "did you mean optim.name?"), ("optim.name=xyz", "one of 'adamw', "),
])  # fmt: skip
def test_a_typo_is_answered_with_the_nearest_name(text, hint):
    with pytest.raises(ConfigError) as error:
        load(None, "", None, [text])
    assert error.value.hint.startswith(hint)
    assert error.value.key == text.partition("=")[0]


@pytest.mark.parametrize(("tree", "key"), [
    ({"form": "hypentropy"}, "optim.form"), ({"name": "lion", "samples": 2}, "optim.samples"),
    ({"name": "lmd", "form": "hypentropy", "regulariser": "constant"}, "optim.regulariser"),
    ({"name": "lmd", "offset": 0.0}, "optim.offset"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(tree, key):
    with pytest.raises(ConfigError) as error:
        build({"optim": tree})
    assert error.value.key == key


def test_what_nobody_set_is_the_optimisers_own_and_what_somebody_set_stays():
    config = RunConfig().with_values(**{"optim.name": "lmd"})
    assert resolved(config).hps.lr == 0.08  # unit-scaled
    plain = config.with_values(**{"rules.parametrisation": "sp", "hps.beta2": 0.95})
    assert resolved(plain).hps.model_dump() == {
        **HP_DEFAULTS, "lr": 0.02, "weight_decay": 0.1, "lr_rest": 0.15, "beta2": 0.95,
    }  # fmt: skip
    assert resolved(resolved(plain)) == resolved(plain)
    assert dict(meta_plan(plain).hps) == resolved(plain).hps.model_dump()
    for name in ("adamw", "sgd", "lion", "muon"):
        other = plain.with_values(**{"optim.name": name})
        assert resolved(other) is other
    stays = resolved(config.with_values(**{"hps.lr": 1.0}))
    assert stays.hps.lr == 1.0  # the common default, but said
