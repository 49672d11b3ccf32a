"""Evaluating and sampling from a run folder."""

import pytest

from isoscale._base.errors import CheckpointError, DataError
from isoscale.train import train
from isoscale.train.inference import evaluate_run, generate_text


@pytest.mark.parametrize("values", [
    {}, {"train.accumulate": 2, "train.precision": "bf16"}, {"numerics.recipe": "fp8"},
    {"data.tokenizer": "bpe:300", "model.dropout": 0.3},
])  # fmt: skip
def test_eval_is_the_runs_own_last_loss_on_the_same_batches(tiny, tmp_path, values):
    result = train(tiny(**values), tmp_path)
    found = evaluate_run(tmp_path, batches=2)
    assert found.loss == result.val_loss
    assert (found.step, found.tokens) == (8, 2 * 4 * 32)
    assert found.nats_per_byte <= found.loss
    assert evaluate_run(tmp_path, batches=3).loss != found.loss


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("generate") / "run"
    train(tiny(**{"data.tokenizer": "bpe:300", "train.steps": 20}), out)
    return out


def test_another_text_is_read_with_the_runs_own_tokenizer(run, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("zzz qqq xxx! " * 2000)
    other = evaluate_run(run, (str(text),), batches=2)
    assert other.loss > evaluate_run(run, batches=2).loss


def test_generate_is_deterministic_per_seed(run):
    one = generate_text(run, "word1 and", 20, seed=1)
    assert one.startswith("word1 and")
    assert one == generate_text(run, "word1 and", 20, seed=1)
    assert one != generate_text(run, "word1 and", 20, seed=2)
    cold = generate_text(run, "word1", 20, temperature=0, seed=1)
    assert cold == generate_text(run, "word1", 20, temperature=0, seed=2)
    assert cold == generate_text(run, "word1", 20, top_k=1, seed=3)


def test_generate_needs_no_training_text(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words here\n" * 500)
    train(tiny(**{"data.source": str(text), "data.tokenizer": "bpe:280"}), tmp_path / "run")
    text.unlink()
    assert generate_text(tmp_path / "run", "some", 5).startswith("some")


def test_what_cannot_be_done_is_said(tiny, tmp_path, run):
    with pytest.raises(DataError, match="prompt is empty"):
        generate_text(run, "", 5)
    with pytest.raises(CheckpointError, match="no run here"):
        generate_text(tmp_path, "a", 5)

    def stop(tick):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train(tiny(), tmp_path / "cut", on_step=stop)
    for call in (lambda: generate_text(tmp_path / "cut", "a", 5), lambda: evaluate_run(tmp_path / "cut")):
        with pytest.raises(CheckpointError, match="no checkpoint yet"):
            call()
