"""TARGETs: what they build, and what a user reads who gets one wrong."""

import sys

import pytest
import torch
from torch import nn

from isoscale._base.errors import ConfigError
from isoscale.check import CheckSettings, run_check
from isoscale.check.subject import resolve
from isoscale.check.task import bigram, make_task

CODE = """
from torch import nn

def build(width, depth):
    return nn.Sequential(nn.Embedding(256, width), *[nn.Linear(width, width) for _ in range(depth)], nn.Linear(width, 256))

def wide(width):
    return nn.Linear(width, 2)

def broken(width, depth):
    return nn.Linear(width, "2")

def text(width, depth):
    return "no model"

def three(a, b, c):
    return None
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with `usermodel.py`, which is the current one."""
    (tmp_path / "usermodel.py").write_text(CODE)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("usermodel", None)


def target(text):
    return resolve(text, smallest=32, unit=False)


def test_a_function_of_the_current_folder(here):
    before = list(sys.path)
    subject = target("usermodel:build")
    assert subject.has_depth
    assert len(subject.build(8, 3).model) == 5
    assert sys.path == before
    assert str(here) not in before


def test_a_module_that_adds_to_the_path_keeps_its_entry(here, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (here / "usermodel.py").write_text("import sys\nsys.path.insert(0, 'of_its_own')\n" + CODE)
    target("usermodel:build")
    assert sys.path[0] == "of_its_own"
    assert str(here) not in sys.path


def test_a_function_of_width_alone(here):
    subject = target("usermodel:wide")
    assert not subject.has_depth
    assert subject.build(8, 99).model.in_features == 8


def test_isoscales_own_decoder_follows_the_rule():
    assert target("isoscale").build(32, 2).model.config.scaling == "plain"
    assert resolve("isoscale", smallest=32, unit=True).build(32, 2).model.config.scaling == "unit"


@pytest.mark.parametrize(("text", "message"), [
    ("usermodel:biuld", "did you mean build?"), ("usermodle:build", "did you mean usermodel?"),
    ("usermodel", "usermodel:build names the function"), ("isoscales", "module:function, a config.json"),
    ("usermodel:three", "takes a width, or a width and a depth"), ("missing/config.json", "no config.json there"), ("confg.json", "did you mean config.json?"),
])  # fmt: skip
def test_a_wrong_target_says_what_is_near(here, text, message):
    if text.endswith(".json"):
        pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match="TARGET") as caught:
        target(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [
    ("broken", "the function raised TypeError"), ("text", r"returned \(str\)"),
])  # fmt: skip
def test_a_function_that_fails_is_named_with_its_sizes(here, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        target(f"usermodel:{name}").build(8, 2)
    assert caught.value.place == "width 8, depth 2"


def test_a_module_that_does_not_import_says_why(here):
    (here / "usermodel.py").write_text("import no_such_package")
    with pytest.raises(ConfigError, match="no_such_package"):
        target("usermodel:build")


def test_text_is_what_a_model_of_ids_is_trained_on(here, small_text):
    built = target("usermodel:build").build(8, 2)
    task = make_task(built, 0, str(small_text))
    ids, targets = task.batch(0)
    assert ids.shape == targets.shape == (8, 64)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert task.loss(built.model, task.batch(0)).item() == pytest.approx(5.5, abs=0.5)
    assert not torch.equal(ids, task.batch(1)[0])
    assert 0 < task.baseline < 3
    assert task.baseline == bigram(256, str(small_text))


def test_the_bigram_baseline_of_a_periodic_text_is_zero(tmp_path):
    (tmp_path / "abc.txt").write_text("abc" * 2000)
    assert bigram(256, str(tmp_path / "abc.txt")) == pytest.approx(0.0, abs=1e-3)


def test_an_example_of_floats_gets_labels_drawn_once():
    subject = resolve(lambda width: (nn.Linear(5, width), torch.ones(7, 5)), smallest=32, unit=False)
    built = subject.build(32, 0)
    first, second = (make_task(built, 0, None) for _ in range(2))
    assert first.loss(built.model, first.batch(0)) == second.loss(built.model, second.batch(3))


@pytest.mark.parametrize("made", [
    lambda width: nn.Linear(width, 2), lambda width: (nn.Conv1d(3, width, 1), torch.ones(2, 3, 4)),
])  # fmt: skip
def test_where_the_loss_is_unknown_the_user_is_asked(made):
    built = resolve(made, smallest=32, unit=False).build(32, 0)
    with pytest.raises(ConfigError, match="return"):
        make_task(built, 0, None)


@pytest.mark.parametrize(("changes", "key"), [
    ({"widths": (64, 64)}, "--width"), ({"depths": (0, 2)}, "--depth"), ({"lr": -1.0}, "--lr"), ({"steps": 0}, "--steps"),
    ({"optimizer": "adam"}, "--optimizer"), ({"base_width": 0}, "--base-width"), ({"rule": "mupp"}, "parametrisation"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes, key):
    with pytest.raises(Exception, match=key):
        CheckSettings(**changes)


def test_one_size_is_not_a_check(tmp_path):
    with pytest.raises(ConfigError, match="only one"):
        run_check("isoscale", tmp_path, CheckSettings(widths=(32,), depths=(2,)))


def test_a_model_that_says_its_input_size_gets_images():
    """As timm's do: `pretrained_cfg["input_size"]`."""

    def build(width):
        model = nn.Sequential(nn.Conv2d(3, width, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
        model.pretrained_cfg = {"input_size": (3, 32, 32)}
        return model

    built = resolve(build, smallest=32, unit=False).build(32, 0)
    task = make_task(built, 0, None)
    assert task.batch(0).shape == (16, 3, 32, 32)
    assert torch.isfinite(task.loss(built.model, task.batch(0)))
