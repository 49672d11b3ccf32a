"""The command line: help with examples, one JSON object, exit codes, and refusals that fit a screen."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.main import get_command

from isoscale._base.files import failing
from isoscale.cli import commands, main
from isoscale.formats import BLOCKS, by_name, error, names
from isoscale.formats.recipes import RECIPES
from isoscale.train import train

NAMES = sorted(get_command(commands.app).commands)
TINY = [part for text in ("model.width=16", "model.head_size=8", "model.depth=1", "train.steps=4", "train.batch=4",
                          "data.seq_len=32", "train.eval_batches=2") for part in ("--set", text)]  # fmt: skip


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def iso(capsys):
    """Run a command: (exit code, stdout, stderr)."""

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    train(tiny(), out)
    return out


def one_object(text):
    assert text.count("\n") == 1, text[:300]
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(data, dict)
    return data


def test_a_finished_run_is_resumed_without_its_flags(iso, done):
    code, text, _ = iso("train", "--out", done, "--resume", "--json", "--quiet")
    assert code == 0
    assert one_object(text)["steps"] == 8
    code, _, err = iso("train", "--out", done, "--resume", "--quiet", "--set", "hps.lr=3.0")
    assert code == 2
    assert "another config" in err
    assert "hps.lr" in err


@pytest.mark.parametrize("name", NAMES)
def test_every_help_has_an_example_and_fits_80_columns(iso, name):
    code, out, _ = iso(name, "--help")
    assert code == 0
    assert f"isoscale {name}" in out.partition("Example")[2]
    assert max(map(len, out.splitlines())) <= 80


def test_the_list_of_commands_is_not_cut(iso):
    code, out, _ = iso("--help")
    assert code == 0
    assert all(name in out for name in NAMES)
    assert "..." not in out.partition("Commands:")[2]


def test_no_command_shows_the_help_and_is_an_error(iso):
    code, out, err = iso()
    assert code == 2
    assert "quickstart" in out + err


# every wrong input, and what its message must hold: (words, what is shown)
BAD = {
    "unknown key": (["train", "--set", "model.widht=64"], ["model.widht", "64", "--set", "did you mean model.width"]),
    "several at once": (["plan", "--set", "model.widht=64", "--set", "hps.lr=-1"], ["2 problems", "model.widht", "hps.lr"]),
    "width and heads": (["train", "--set", "model.width=100"], ["model.width", "100", "head_size 16", "96"]),
    "LR 0": (["train", "--set", "hps.lr=0"], ["hps.lr", "0", "greater than"]),
    "LR negative": (["train", "--set", "hps.lr=-0.5"], ["hps.lr", "-0.5"]),
    "LR nan": (["train", "--set", "hps.lr=nan"], ["hps.lr", "nan"]),
    "LR word": (["train", "--set", "hps.lr=high"], ["hps.lr", "high", "number"]),
    "recipe": (["train", *TINY, "--set", "numerics.recipe=fp88"], ["numerics.recipe", "fp88", "did you mean fp8"]),
    "parametrisation": (["plan", "--set", "rules.parametrisation=u-mpu"], ["u-mpu", "u-mup"]),
    "preset": (["plan", "--preset", "proxi"], ["--preset", "proxi", "did you mean proxy"]),
    "command": (["trian"], ["trian"]),
    "flag": (["train", "--stes", "3"], ["--stes"]),
    "strategy": (["sweep", "--set", "sweep.strategy=bayes"], ["sweep.strategy", "bayes", "'lr'", "'random'"]),
    "random without trials": (["sweep", "--set", "sweep.strategy=random"], ["sweep.trials", "--set sweep.trials=20"]),
    "budget": (["sweep", *TINY, "--set", "sweep.budget_tokens=10"], ["sweep.budget_tokens", "10", "one costs 512"]),
    "set without value": (["plan", "--set", "model.width"], ["--set", "model.width", "key=value"]),
    "device": (["train", *TINY, "--set", "train.device=tpu"], ["train.device", "tpu", "auto, cpu"]),
    "backend": (["train", *TINY, "--set", "numerics.recipe=fp8", "--set", "numerics.backend=scaled_mm"], ["numerics.backend", "emulated"]),
    "muP without base": (["plan", "--set", "rules.parametrisation=mup"], ["base"]),
    "missing config": (["plan", "--config", "/no/such.toml"], ["/no/such.toml"]),
    "missing text": (["train", "--data", "/no/such/text"], ["/no/such/text"]),
    "no run": (["eval", "/no/such/run"], ["/no/such/run", "no run here"]),
    "no sweep": (["transfer", "/no/such/sweep", "--width", "256"], ["/no/such/sweep", "no sweep here"]),
    "no target": (["transfer", "/no/such/sweep"], ["--width"]),
    "nothing to report": (["report", "/no/such/folder"], ["/no/such/folder"]),
    "explain": (["plan", "--explain", "blocks.0.attn.qkw"], ["blocks.0.attn.qkw", "did you mean", "blocks.0.attn.qkv.weight"]),
    "temperature": (["generate", "x", "--temperature", "-1"], ["--temperature"]),
    "prompt": (["generate", "{done}", "--prompt", ""], ["prompt is empty"]),
    "used folder": (["train", *TINY, "--out", "{done}"], ["holds a run already", "--resume"]),
    "other config": (["train", *TINY, "--out", "{done}", "--resume"], ["another config", "train.steps", "8 -> 4"]),
    "empty file": (["train", *TINY, "--data", "{tmp}/empty.txt"], ["empty.txt", "empty"]),
    "binary file": (["train", *TINY, "--data", "{tmp}/binary.txt"], ["binary.txt"]),
    "short file": (["train", *TINY, "--data", "{tmp}/short.txt"], ["33", "seq_len"]),
    "file as folder": (["train", *TINY, "--out", "{tmp}/short.txt"], ["--out", "short.txt", "file"]),
    "no TOML": (["plan", "--config", "{tmp}/short.txt"], ["short.txt", "TOML"]),
    "unknown format": (["formats", "show", "mxpf4"], ["mxpf4", "did you mean mxfp4"]),
    "no rule": (["formats", "show", "mxfp4/flor"], ["flor", "floor"]),
    "no tensors": (["formats", "error", "/no/such.safetensors"], ["no such file", "/no/such.safetensors"]),
    "no safetensors": (["formats", "error", "{tmp}/short.txt"], ["not a safetensors file", "short.txt"]),
    "folder without": (["formats", "error", "{tmp}"], ["no model.safetensors", "checkpoint folder"]),
    "format of error": (["formats", "error", "{tmp}/short.txt", "--format", "fp4"], ["fp4", "did you mean"]),
    "init over a file": (["init", "{tmp}/short.txt"], ["short.txt", "--force"]),
}  # fmt: skip


@pytest.fixture
def bad_files(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "short.txt").write_text("too short")
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_2_and_one_screen_that_helps(iso, bad_files, done, monkeypatch, case):
    monkeypatch.chdir(bad_files)
    words, wanted = BAD[case]
    words = [word.format(tmp=bad_files, done=done) if "{" in word and "=" not in word else word for word in words]
    code, out, err = iso(*words)
    assert code == 2
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 24, err
    for text in wanted:
        assert text in err, (text, err)
    assert not (bad_files / "runs").exists()  # a refusal leaves nothing behind
    if case not in ("command", "no target"):
        code, out, _ = iso(*words, "--json")
        assert code == 2
        assert one_object(out)["error"]


def test_debug_shows_where_it_came_from(iso):
    from isoscale import IsoscaleError

    with pytest.raises(IsoscaleError):
        iso("plan", "--set", "model.widht=1", "--debug")


def test_a_damaged_checkpoint_is_named(iso, tiny, tmp_path):
    train(tiny(), tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    for command in ("eval", "generate"):
        code, _, err = iso(command, tmp_path / "run")
        assert code == 2
        assert "no sound checkpoint" in err
        assert "model.safetensors" in err


@pytest.mark.parametrize(("number", "text"), [(errno.ENOSPC, "disk full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")])
def test_a_disk_that_refuses(iso, small_text, tmp_path, number, text):
    def hook(name, path):
        if name == "write" and str(tmp_path) in str(path):
            raise OSError(number, os.strerror(number))

    with failing(hook):
        code, _, err = iso("train", *TINY, "--data", small_text, "--out", tmp_path / "run", "--quiet")
    assert code == 2
    assert text in err
    assert str(tmp_path / "run") in err
    assert "Traceback" not in err


def test_an_interrupt_is_130_and_says_what_to_do(iso, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("isoscale.train.train", interrupted)
    code, _, err = iso("train", *TINY)
    assert code == 130
    assert "--resume" in err


def test_sigterm_is_an_interrupt_that_saves(small_text, tmp_path):
    out = tmp_path / "run"
    words = ["train", *TINY, "--set", "train.steps=5000", "--data", str(small_text), "--out", str(out), "--quiet"]
    script = "import sys; from isoscale.cli import main; sys.exit(main(sys.argv[1:]))"
    child = subprocess.Popen([sys.executable, "-c", script, *words], stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        assert child.poll() is None, child.stderr.read()
    child.terminate()
    assert child.wait(timeout=60) == 130
    assert "interrupted" in child.stderr.read()
    from isoscale.train import checkpoint

    saved = checkpoint.load_latest(out)
    assert saved is None or saved.step >= 1


def test_a_reader_that_goes_away_is_no_error():
    script = "import sys; from isoscale.cli import main; sys.exit(main(['plan']))"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.close()
    assert "Traceback" not in child.stderr.read()
    assert child.wait(timeout=60) == 0


def test_train_eval_generate_report_end_to_end(iso, small_text, tmp_path):
    out = tmp_path / "run"
    code, text, _ = iso("train", *TINY, "--data", small_text, "--out", out, "--json")
    trained = one_object(text)
    assert (code, trained["steps"], trained["out"]) == (0, 4, str(out))
    code, text, _ = iso("train", *TINY, "--data", small_text, "--out", out, "--resume", "--json", "--quiet")
    assert one_object(text) == trained
    code, text, _ = iso("eval", out, "--batches", 2, "--json")
    assert one_object(text)["loss"] == trained["val_loss"]
    code, text, _ = iso("eval", out, "--data", small_text, "--batches", 2)
    assert code == 0
    assert f"{trained['val_loss']:.4f} nats/token" in text
    code, text, _ = iso("generate", out, "--prompt", "word", "--tokens", 5, "--json")
    assert one_object(text)["text"].startswith("word")
    code, text, _ = iso("report", out, "--json")
    assert one_object(text)["report"] == str(out / "report.html")


def test_init_writes_a_file_that_plan_and_train_take(iso, small_text, tmp_path):
    file = tmp_path / "my.toml"
    code, text, _ = iso("init", file, "--preset", "target", "--json")
    assert (code, one_object(text)["file"]) == (0, str(file))
    _, from_file, _ = iso("plan", "--config", file)
    _, from_preset, _ = iso("plan", "--preset", "target")
    assert from_file == from_preset
    assert iso("init", file, "--force")[0] == 0
    code, _, err = iso("train", "--config", file, *TINY, "--data", small_text, "--out", tmp_path / "run", "-q")
    assert code == 0, err


def test_plan_explains_parameters_and_sites_and_says_who_set_what(iso):
    _, text, _ = iso("plan", "--set", "hps.lr=2", "--explain", "blocks.0.attn.qkv.weight")
    assert "lr            0.125 = lr 2 x fan_in^-1/2" in text
    assert "hps.lr = 2.0, --set hps.lr=2" in text
    _, text, _ = iso("plan", "--explain", "blocks.0.attn.logits")
    assert "0.0625" in text
    _, text, _ = iso("plan", "--explain", "blocks.0.attn.logits", "--json")
    assert one_object(text)["name"] == "blocks.0.attn.logits"


def test_plan_diff_shows_what_changes(iso):
    _, text, _ = iso("plan", "--preset", "target", "--diff", "proxy")
    assert "blocks.*.attn.qkv.weight  lr: 0.0625 -> 0.03125" in text
    qkv = "blocks.*.attn.qkv.weight  formats:"
    assert f"{qkv}\n    w fp32, x fp32, g fp32 ->\n    w e4m3, x e4m3, g e5m2\n" in text
    assert "head.weight  formats: w fp32, x fp32, g fp32 -> w bf16, x bf16, g bf16\n" in text
    _, text, _ = iso("plan", "--set", "numerics.recipe=mxfp6-forward", "--diff", "proxy")
    assert f"{qkv}\n    w fp32, x fp32, g fp32 ->\n    w mxfp6_e3m2/floor, x mxfp6_e3m2/floor, g bf16; backward w" in text
    assert max(map(len, text.splitlines())) <= 80
    assert iso("plan", "--diff", "proxy")[1] == "no difference\n"
    _, text, _ = iso("plan", "--preset", "target", "--diff", "proxy", "--json")
    assert len(one_object(text)["changes"]) > 5
    _, text, _ = iso("plan", "--json")
    assert one_object(text)["plan"]["parametrisation"] == "u-mup"


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_trains_from_the_command_line(iso, small_text, tmp_path, recipe):
    """Four steps, with the casts of every layer logged."""
    sets = [part for word in (f"numerics.recipe={recipe}", "numerics.log_casts=true", "numerics.backend=emulated") for part in ("--set", word)]
    out = tmp_path / "run"
    code, text, err = iso("train", *TINY, *sets, "--data", small_text, "--out", out, "-q", "--json")
    assert code == 0, err
    result = one_object(text)
    assert result["backend"] == ("none" if recipe == "none" else "emulated")
    assert result["val_loss"] < 8
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    formats = {row["format"] for row in rows if row["kind"] == "cast"}
    used = [f.passes.values() for _, f in RECIPES[recipe].layers]
    assert formats == {name for passes in used for pair in passes for name in pair}
    assert iso("report", out)[0] == 0


def test_sweep_transfer_and_report(iso, small_text, tmp_path):
    out = tmp_path / "sweep"
    words = ["sweep", *TINY, "--data", small_text, "--set", "sweep.space={lr=[1.0, 2.0, 4.0]}", "--out", out, "-w", 1]
    code, text, _ = iso(*words, "--json", "--quiet")
    swept = one_object(text)
    assert code == 0
    assert len(swept["trials"]) == 3
    code, text, _ = iso(*words, "--resume", "--quiet")
    assert code == 0
    assert text.count("<- best") == 1
    assert ("warning: the best LR is at an end" in text) == swept["edge"]
    assert "isoscale transfer" in text
    code, text, _ = iso("transfer", out, "--width", 32)
    assert code == 0
    assert "only 2x wider" in text  # a warning, not a refusal
    code, text, _ = iso("transfer", out, "--width", 64, "--recipe", "fp8", "--train", "--out", tmp_path / "target", "-q", "--json")
    moved = one_object(text)
    assert moved["hps"] == swept["best"]
    assert moved["result"]["val_loss"] > 0
    code, _, err = iso("transfer", out, "--width", 16)
    assert code == 2
    assert "the target is the proxy itself" in err
    assert iso("report", out)[0] == 0


def test_doctor(iso, monkeypatch, tmp_path):
    code, text, _ = iso("doctor")
    assert code == 0
    assert "fp8 matmul" in text
    told = [line for line in text.splitlines() if line.startswith(("casts", "scaled_mm"))]
    assert len(told) == 4
    assert max(map(len, told)) <= 80
    facts = one_object(iso("doctor", "--json")[1])
    assert facts["cache writable"] is True
    assert facts["scaled_mm"] == "none" or torch.cuda.is_available()
    assert facts["casts on a CPU"] == "C++ rows" or facts["casts on a CPU"].startswith("torch reference: ")
    monkeypatch.setattr(os, "access", lambda *args: False)
    code, text, _ = iso("doctor")
    assert code == 1
    assert "ISOSCALE_CACHE" in text


def test_main_puts_the_signal_handler_back(iso):
    import signal

    before = signal.getsignal(signal.SIGTERM)
    iso("plan")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("word", ["show", "error"])
def test_help_of_the_formats_commands(iso, word):
    code, out, _ = iso("formats", word, "--help")
    assert code == 0
    assert f"isoscale formats {word}" in out.partition("Example")[2]
    assert max(map(len, out.splitlines())) <= 80


def test_formats_lists_every_format_in_80_columns(iso):
    code, text, _ = iso("formats")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    rows = {line.split()[0]: line.split() for line in text.splitlines()[1:] if line}
    assert set(names()) <= set(rows)
    assert rows["mxfp6_e3m2"] == ["mxfp6_e3m2", "6.25", "e3m2", "1x32", "e8m0", "floor", "28", "0.25", "0.0625"]
    listed = one_object(iso("formats", "--json")[1])["formats"]
    assert [row["name"] for row in listed] == list(names())
    assert next(row for row in listed if row["name"] == "nvfp4")["bits_per_value"] == 4.5


@pytest.mark.parametrize("name", ["mxfp6_e3m2", "mxfp4/rceil", "e5m2", "e4m3", "int8", "e8m0", "bf16", "e3m4", "fp8_row_e4m3"])
def test_formats_show(iso, name):
    code, text, _ = iso("formats", "show", name)
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    data = one_object(iso("formats", "show", name, "--json")[1])
    assert data["name"].startswith(name)
    element = by_name(name) if "/" not in name and "_" not in name else by_name(name).element
    if element.bits > 8:
        assert "too many to list" in text
    elif element.layout != "scale":
        assert len(data["values"]) == 2**element.bits
        shown = [float(cell) for line in text.partition("values")[2].splitlines()[1:] for cell in line.split()]
        assert shown == pytest.approx([v for v in element.values() if v >= 0], rel=1e-5)


@pytest.fixture
def tensors(tmp_path):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=draw)
    save_file({"w": x, "low": x.bfloat16() * 2.0**-30, "ids": torch.arange(4), "none": torch.zeros(0, 3), "zero": torch.zeros(2, 32),
               "bad": torch.tensor([1.0, float("nan")]), "scalar": torch.tensor(2.5)}, tmp_path / "m.safetensors")  # fmt: skip
    return tmp_path / "m.safetensors"


def test_formats_error_measures_every_float_tensor(iso, tensors):
    code, text, _ = iso("formats", "error", tensors)
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    assert "ids: int64, no float to be cast" in text
    assert "none: empty" in text
    assert "zero  2x32 float32: all zero: nothing to lose" in text
    assert "bad  2 float32: 1 inf or NaN: no advice" in text
    data = one_object(iso("formats", "error", tensors, "--json")[1])
    found = {row["name"]: row for row in data["tensors"]}
    assert set(found) == {"w", "low", "zero", "bad", "scalar"}
    assert set(data["skipped"]) == {"ids", "none"}
    assert {loss["format"] for loss in found["w"]["losses"]} == {*(str(fmt) for fmt in BLOCKS), "e4m3", "e5m2"}
    by = {loss["format"]: loss for loss in found["w"]["losses"]}
    told = error(load_file(tensors)["w"], "mxfp4/floor")
    assert by["mxfp4/floor"]["sqnr_db"] == pytest.approx(told.sqnr_db)
    assert by["mxfp4/floor"]["clipped"] == pytest.approx(told.clipped)
    order = [loss["sqnr_db"] for loss in found["w"]["losses"]]
    assert order == sorted(order, reverse=True)
    low = {loss["format"]: loss for loss in found["low"]["losses"]}
    assert low["e4m3"]["flushed"] == 1  # a plain cast loses a tensor that is far too small; a block's scale saves it
    assert low["mxfp8_e4m3/floor"]["flushed"] < 0.01


def test_formats_error_recommends_the_fewest_bits_that_do(iso, tensors):
    def advice(*words):
        data = one_object(iso("formats", "error", tensors, "--json", *words)[1])
        return {row["name"]: row["format"] for row in data["tensors"]}

    assert advice()["w"] == "mxfp6_e2m3/floor"
    assert advice("--min-sqnr", 15)["w"] == "mxfp4/floor"
    assert advice("--min-sqnr", 35)["w"] == "mxint8/floor"
    assert advice("--min-sqnr", 90)["w"] == ""
    assert advice("--format", "mxfp8_e4m3", "--format", "mxfp8_e5m2")["w"] == "mxfp8_e4m3/floor"
    assert advice()["bad"] == advice()["zero"] == ""
    along, across = (one_object(iso("formats", "error", tensors, "--format", "mxfp4", "--axis", a, "--json")[1]) for a in (-1, 0))
    (along,), (across,) = ([row["losses"] for row in data["tensors"] if row["name"] == "w"] for data in (along, across))
    assert along != across
    _, text, _ = iso("formats", "error", tensors, "--axis", 1)
    assert "bad: 1 axes, none with number 1" in text


def test_formats_error_writes_a_page(iso, tensors, tmp_path):
    out = tmp_path / "page.html"
    code, text, _ = iso("formats", "error", tensors, "--out", out)
    assert code == 0
    assert f"wrote {out}" in text
    page = out.read_text()
    for word in ("mxfp6_e2m3/floor", "log2 of the magnitude", "int64, no float to be cast", "at least 25 dB"):
        assert word in page
    assert page.count("plotly.js v") == 1  # the script once
    assert "<script src=" not in page  # no network


def test_formats_error_takes_a_run_and_a_checkpoint_folder(iso, done):
    step = sorted((done / "checkpoints").glob("step_*"))[-1]
    run, saved = (one_object(iso("formats", "error", p, "--format", "mxfp4", "--json")[1]) for p in (done, step))
    assert run["tensors"] == saved["tensors"]
    assert any(row["name"] == "head.weight" for row in run["tensors"])
