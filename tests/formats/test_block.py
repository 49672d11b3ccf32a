"""Block formats as data: names, rules, blocks, and what is refused."""

import pytest

from isoscale import formats as F
from isoscale._base.errors import ConfigError


def test_every_name_gives_its_format_and_prints_its_rule():
    for fmt in F.BLOCKS:
        assert F.by_name(fmt.name) is fmt
        assert F.by_name(str(fmt)) == fmt
        assert str(fmt) == f"{fmt.name}/{fmt.scale_rule}"


@pytest.mark.parametrize(
    ("name", "bits"),
    [("mxfp8_e4m3", 8.25), ("mxfp8_e5m2", 8.25), ("mxfp6_e3m2", 6.25), ("mxfp6_e2m3", 6.25), ("mxfp4", 4.25),
     ("mxint8", 8.25), ("nvfp4", 4.5), ("fp8_1x128_e4m3", 8.25), ("fp8_tensor_e5m2", 8.0)],
)  # fmt: skip
def test_bits_a_value(name, bits):
    assert F.by_name(name).bits_per_value() == bits


def test_a_name_goes_on_with_rule_and_block():
    fmt = F.by_name("MXFP4/rceil/16x16")
    assert (fmt.scale_rule, fmt.block, fmt.element) == ("rceil", (16, 16), F.E2M1)
    assert str(fmt) == "mxfp4/rceil/16x16"
    assert F.by_name("mxfp4/1x16").scale_rule == "floor"
    assert F.by_name("mxfp4").with_(scale_rule="even") == F.by_name("mxfp4/even")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mxfp5", "did you mean mxfp4"), ("e4m4", "e4m3"), ("mxfp4/rcel", "did you mean rceil"),
        ("nvfp4/floor", "stores e4m3 scales"), ("mxfp4/amax", "stores e8m0 scales"), ("e4m3/floor", "no scale"),
        ("mxfp4/a/b", "mxfp4/rceil/16x16"), ("", "no such format"), ("mxfp4/", "no such scale rule"),
    ],
)  # fmt: skip
def test_wrong_names_are_refused_and_the_nearest_named(name, says):
    with pytest.raises(ConfigError, match=says):
        F.by_name(name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scale": "e5m2"}, "no such scale"), ({"block": (1, 2, 3)}, "no such block"), ({"block": (1, -2)}, "no such block"),
        ({"element": F.FP16}, "4, 6 or 8 bits"), ({"element": F.E8M0}, "4, 6 or 8 bits"), ({"scale_rule": "up"}, "rule"),
    ],
)  # fmt: skip
def test_impossible_formats_are_refused(change, says):
    given = {"name": "mine", "element": F.E2M1, "block": (1, 32)} | change
    with pytest.raises(ConfigError, match=says):
        F.BlockFormat(**given)


def test_an_element_format_is_wanted_where_one_is_asked_for():
    assert F.element_by_name("e3m2") is F.E3M2
    with pytest.raises(ConfigError, match="element format is wanted"):
        F.element_by_name("mxfp4")
