"""Small checks on a small text."""

import pytest

from isoscale.check import CheckSettings


@pytest.fixture(scope="session")
def quick(small_text):
    """`quick(**changes)`: settings of a check that takes a second or two."""

    def make(**changes):
        given = {"widths": (32, 64, 128), "depths": (2,), "steps": 3, "seeds": 2, "data": str(small_text), **changes}
        return CheckSettings(**given)

    return make


@pytest.fixture
def hf():
    """transformers, where it is installed and imports."""
    transformers = pytest.importorskip("transformers")
    try:
        _ = transformers.LlamaForCausalLM
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"transformers does not import here: {error}")
    return transformers
