"""The order of the data depends on seed and step only; training and validation share no byte."""

import multiprocessing
import os
import sys

import numpy as np
import pytest

from isoscale._base.errors import ConfigError, DataError, StorageError
from isoscale.train import data
from isoscale.train.data import TokenStream, eval_batches, load_corpus, split_text


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number} é\n" for number in range(2000)))
    return path


def test_train_and_validation_are_disjoint_and_complete(tmp_path):
    parts = []
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 1000)
        parts.append(name.encode() * 900)
    corpus = load_corpus([str(tmp_path / "a"), str(tmp_path / "b")], cache=tmp_path / "cache", seq_len=16)
    assert corpus.train.tobytes() == b"".join(parts)
    assert corpus.val.tobytes() == b"a" * 100 + b"b" * 100
    assert (corpus.vocab, corpus.bytes_per_token) == (256, 1.0)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.33, 0.5, 0.999])
def test_a_split_cuts_between_characters(fraction):
    whole = "aé日🙂" * 57
    head, tail = split_text(whole.encode(), fraction)
    assert head.decode() + tail.decode() == whole


def test_the_cache_is_used_and_keyed_by_content_tokenizer_and_split(text, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = load_corpus(str(text), cache=cache, seq_len=16)
    assert isinstance(first.train, np.memmap)
    text.rename(tmp_path / "other.txt")
    monkeypatch.setattr(data, "_build", None)  # any build would now fail
    again = load_corpus(str(tmp_path / "other.txt"), cache=cache, seq_len=32)
    assert (again.train == first.train).all()
    assert again.sha256 == first.sha256
    with pytest.raises(TypeError):
        load_corpus(str(tmp_path / "other.txt"), cache=cache, seq_len=16, val_fraction=0.2)
    with pytest.raises(TypeError):
        load_corpus(str(tmp_path / "other.txt"), "bpe:300", cache=cache, seq_len=16)
    (tmp_path / "other.txt").write_text("changed " * 1000)
    with pytest.raises(TypeError):
        load_corpus(str(tmp_path / "other.txt"), cache=cache, seq_len=16)


def test_the_default_cache_is_a_setting(text, tmp_path, monkeypatch):
    monkeypatch.setenv("ISOSCALE_CACHE", str(tmp_path / "here"))
    load_corpus(str(text), seq_len=16)
    assert list((tmp_path / "here" / "tokens").iterdir())
    monkeypatch.delenv("ISOSCALE_CACHE")
    assert data.cache_folder().parts[-2:] == (".cache", "isoscale")


def test_a_bpe_corpus_comes_back_from_the_cache(text, tmp_path):
    pytest.importorskip("tokenizers")
    first = load_corpus(str(text), "bpe:300", cache=tmp_path / "c", seq_len=16)
    again = load_corpus(str(text), "bpe:300", cache=tmp_path / "c", seq_len=16)
    assert first.train.dtype == np.uint16
    assert (again.train == first.train).all()
    assert again.tokenizer.to_json() == first.tokenizer.to_json()
    head, tail = split_text(text.read_bytes(), 0.1)
    assert again.tokenizer.decode(again.train.tolist()) == head.decode()
    assert again.bytes_per_token == len(tail) / len(again.val)


@pytest.mark.parametrize("name", ["train.npy", "val.npy", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "longer", "gone"])
def test_a_damaged_cache_is_rebuilt(text, tmp_path, name, damage):
    cache = tmp_path / "c"
    want = np.array(load_corpus(str(text), cache=cache, seq_len=16).train)
    [folder] = (cache / "tokens").iterdir()
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[:-9] if damage == "cut" else content + b"tail")
    corpus = load_corpus(str(text), cache=cache, seq_len=16)
    assert (corpus.train == want).all()
    assert file.read_bytes() == content
    assert [one.name for one in (cache / "tokens").iterdir()] == [folder.name]


def _load(path, cache, queue):
    corpus = load_corpus(path, cache=cache, seq_len=16)
    queue.put(int(corpus.train.astype(np.int64).sum()))


def test_processes_may_build_at_once(text, tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    queue = context.Queue()
    workers = [context.Process(target=_load, args=(str(text), tmp_path / "c", queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    sums = {queue.get(timeout=30) for _ in workers}
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(sums) == 1
    assert len(list((tmp_path / "c" / "tokens").iterdir())) == 1


def test_too_short_a_text_is_refused_with_numbers(tmp_path):
    (tmp_path / "x").write_text("a" * 1000)
    with pytest.raises(DataError, match=r"validation part has 100 tokens, .* takes 129"):
        load_corpus(str(tmp_path / "x"), cache=tmp_path / "c", seq_len=128)
    with pytest.raises(DataError, match="train part has 900 tokens"):
        load_corpus(str(tmp_path / "x"), cache=tmp_path / "c", seq_len=1000)


@pytest.mark.parametrize("seq_len", [1, 0, -3, True, 2.0])
def test_a_sequence_has_two_tokens(text, tmp_path, seq_len):
    with pytest.raises(DataError, match="at least 2"):
        load_corpus(str(text), cache=tmp_path / "c", seq_len=seq_len)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_fraction_is_a_share(text, tmp_path, fraction):
    with pytest.raises(ConfigError):
        load_corpus(str(text), cache=tmp_path / "c", seq_len=16, val_fraction=fraction)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_is_named(text, tmp_path):
    (tmp_path / "c").mkdir(mode=0o500)
    with pytest.raises(StorageError):
        load_corpus(str(text), cache=tmp_path / "c", seq_len=16)


TOKENS = np.arange(1000, dtype=np.uint16)


def global_stream(steps=60, **changes):
    stream = TokenStream(TOKENS, **{"seq_len": 16, "batch": 8, "seed": 3, **changes})
    return [stream.batch(step) for step in range(steps)]


def test_targets_are_inputs_one_token_later():
    for inputs, targets in global_stream():
        assert inputs.shape == targets.shape == (8, 16)
        assert inputs.dtype == targets.dtype == np.int64
        assert (targets == inputs + 1).all()


def test_an_epoch_visits_each_window_once():
    stream = TokenStream(TOKENS, 16, 1, 3)
    epochs = [
        sorted(int(stream.batch(step)[0][0, 0]) for step in range(first, first + stream.windows))
        for first in (0, stream.windows, 2 * stream.windows)
    ]
    for starts in epochs:
        assert set(np.diff(starts)) == {16}
        assert len(starts) == stream.windows == 61
    assert len({starts[0] for starts in epochs}) > 1  # the phase moves


def test_cut_at_every_step_the_rest_is_the_same():
    whole = global_stream()
    for cut in range(60):
        fresh = TokenStream(TOKENS, 16, 8, 3)
        for step in range(cut, min(cut + 3, 60)):
            assert (fresh.batch(step)[0] == whole[step][0]).all()


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_slice_one_global_stream(world):
    streams = [TokenStream(TOKENS, 16, 8, 3) for _ in range(world)]
    for step, (inputs, targets) in enumerate(global_stream()):
        parts = [stream.slice(step, rank, world) for rank, stream in enumerate(streams)]
        assert (np.concatenate([part[0] for part in parts]) == inputs).all()
        assert (np.concatenate([part[1] for part in parts]) == targets).all()


def test_batches_larger_than_an_epoch_run_on():
    inputs, _ = TokenStream(TOKENS[:40], 16, 8, 3).batch(0)
    single = TokenStream(TOKENS[:40], 16, 1, 3)
    assert (inputs == np.concatenate([single.batch(step)[0] for step in range(8)])).all()


def test_seeds_differ():
    assert (global_stream(seed=3)[0][0] != global_stream(seed=4)[0][0]).any()


@pytest.mark.parametrize("count", range(17, 60))
def test_any_length_that_holds_one_sequence_works(count):
    stream = TokenStream(TOKENS[:count], 16, 2, 0)
    seen = np.concatenate([stream.batch(step)[1] for step in range(20)])
    assert seen.max() < count
    assert (stream.batch(0)[1] == stream.batch(0)[0] + 1).all()


def test_stream_refusals():
    with pytest.raises(DataError, match="16 tokens"):
        TokenStream(TOKENS[:16], 16, 1, 0)
    with pytest.raises(ConfigError):
        TokenStream(TOKENS, 16, 0, 0)
    stream = TokenStream(TOKENS, 16, 6, 0)
    for step, rank, world in ((-1, 0, 1), (0, 2, 2), (0, -1, 2), (0, 0, 0), (0, 0, 4)):
        with pytest.raises(ConfigError):
            stream.slice(step, rank, world)


def test_eval_batches_are_even_and_fixed():
    batches = list(eval_batches(TOKENS, 16, 4, 3))
    starts = np.concatenate([inputs[:, 0] for inputs, _ in batches])
    assert len(batches) == 3
    assert starts[0] == 0
    assert batches[-1][1][-1, -1] == 999
    assert np.ptp(np.diff(starts)) <= 1
    assert all((a[0] == b[0]).all() for a, b in zip(batches, eval_batches(TOKENS, 16, 4, 3), strict=True))
    assert len(list(eval_batches(TOKENS[:17], 16, 1, 1))) == 1


def test_eval_refusals():
    for arguments in ((TOKENS[:16], 16, 1, 1), (TOKENS, 1, 1, 1)):
        with pytest.raises(DataError):
            eval_batches(*arguments)
    for batch, count in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError):
            eval_batches(TOKENS, 16, batch, count)
