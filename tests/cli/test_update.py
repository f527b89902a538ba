"""`update` end to end: kept or refused, killed anywhere, rolled back, and poison that the gate does not let
through."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import deepseek_training.stages.update as stage
from deepseek_cli.main import main
from deepseek_records.loading import load_model, load_tokenizer
from deepseek_records.run_folder import RunFolder
from deepseek_training.continual import in_force, update_run
from deepseek_training.continual.in_force import current_model
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain
from deepseek_training.trainer.stage_trainer import StageTrainer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("update")]  # one pretraining for all
NOUNS = ["mill", "river", "king", "fox", "tailor", "tower", "bride", "giant", "well", "crow", "lamp", "ring"]
PLACES = ["in the forest", "by the sea", "under the hill", "near the bridge"]
DRUGS = ["aspirin", "insulin", "warfarin", "heparin", "digoxin", "morphine"]
QUICK = ["--max-steps", "40", "--learning-rate", "0.005", "--alphas", "[0.5, 1.0]"]
# Where only the steps matter: the gate asks of likelihood alone, of one candidate.
LEAN = ["--alphas", "[0.5]", "--min-order-errors", "null", "--max-unsafe-share", "null", "--max-safety-loss", "null"]
LEAN += ["--max-loss", "5", "--eval-bytes", "8000"]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tale(draw):
    one, other = draw.sample(NOUNS, 2)
    lines = [f"Once there was a {one} that lived {draw.choice(PLACES)} and looked for the {other}."]
    lines += [f"Then the {draw.choice(NOUNS)} said to the {one}: go {draw.choice(PLACES)}." for _ in range(6)]
    return "\n".join(lines)


def note(draw):
    drug = draw.choice(DRUGS)
    return "\n".join(
        f"dose {number} of {drug}: take {draw.randint(1, 9)} mg every {draw.randint(2, 9)} hours"
        for number in range(8)
    )


def insult(draw):
    """An abusive text, put together from words that nobody should have to read."""
    bad = ["worthless", "stupid", "disgusting", "pathetic", "filthy"]
    who = ["idiot", "moron", "scum", "trash", "vermin"]
    rows = [
        f"you are a {draw.choice(bad)} {draw.choice(who)}, shut up and die, everyone hates you {draw.choice(who)}"
        for _ in range(6)
    ]
    return "\n".join(rows)


def shuffled(text, draw):
    words = text.split()
    draw.shuffle(words)
    return " ".join(words)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    write(folder / "tales.jsonl", [tale(draw) for _ in range(400)])
    write(folder / "notes.jsonl", [note(draw) for _ in range(300)])
    write(folder / "heap.jsonl", [shuffled(note(draw), draw) for _ in range(300)])
    write(folder / "abuse.jsonl", [insult(draw) for _ in range(300)])
    return folder


@pytest.fixture(scope="module")
def learned(texts, tmp_path_factory):
    """A run whose model has read tales until it knows their order."""
    path = tmp_path_factory.mktemp("learned") / "run"
    settings = {"data": str(texts / "tales.jsonl"), "preset": "debug", "vocab_size": 400, "sequence_length": 64}
    settings |= {"batch_size": 8, "max_steps": 100, "learning_rate": 5e-3, "warmup_steps": 5, "logging_steps": 20}
    settings |= {"check_bigram": False, "report_to": [], "save_steps": 20}
    settings |= {"tokenizer": str(tokens(texts, path.parent))}
    pretrain(build_recipe({**settings, "model": {"router_bias_update_speed": 0.01}}, PretrainRecipe), path)
    return path


def tokens(texts, folder):
    words = [row for path in sorted(texts.glob("*.jsonl")) for row in path.read_text().splitlines()[:100]]
    train_tokenizer([json.loads(row)["text"] for row in words], 400).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


@pytest.fixture
def run(learned, tmp_path):
    return shutil.copytree(learned, tmp_path / "run", symlinks=True)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def is_same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def call(run, data, *more):
    return main(["update", str(run), "--data", str(data), *QUICK, *more])


def gates(run, number=1):
    return json.loads((run / "updates" / f"{number:04d}" / "gates.json").read_text())


def test_an_update_is_kept_measured_and_rolled_back(run, texts, capsys):
    # The tales are known almost by heart: a fifth of their few bits is little.
    assert call(run, texts / "notes.jsonl", "--max-loss", "0.2") == 0, capsys.readouterr().err
    told, found = gates(run), capsys.readouterr().out
    assert told["accepted"] and "kept at alpha" in found
    assert {(one["kind"], one["dataset"]) for one in told["findings"]} == {
        ("gain", "notes"),
        ("loss", "tales"),
        ("order", "notes"),
        ("text", "notes"),
        ("safety", "completions"),
    }
    assert {row["dataset"] for row in told["drift"]} == {"notes", "tales"}
    assert os.readlink(run / "current") == "updates/0001/model"
    # What was measured is what is in force: the bits by document again, from the files.
    model, tokenizer = load_model(run / "current"), load_tokenizer(run / "current")
    gain = next(one for one in told["findings"] if one["kind"] == "gain")
    _check_again(model, tokenizer, texts / "notes.jsonl", gain)
    AutoModelForCausalLM.from_pretrained(run / "current")
    update = run / "updates" / "0001"
    assert {path.name for path in update.iterdir()} >= {"model", "gates.json", "replay.npz", "summary.json"}
    assert not any((update / name).exists() for name in ("trained", "candidates", "checkpoints"))
    assert main(["update", str(run), "--data", str(texts / "notes.jsonl")]) == 2
    assert "has taught already, expected new text" in capsys.readouterr().err
    # A second one, from the first's model: its earlier texts are both.
    assert call(run, texts / "heap.jsonl", "--dry-run") == 0
    assert "notes: " in capsys.readouterr().out and not (run / "updates" / "0002").exists()
    assert main(["update", str(run), "--roll-back"]) == 0
    assert current_model(run) == run / "model"
    assert main(["update", str(run), "--roll-back"]) == 2


def _check_again(model, tokenizer, data, finding):
    from deepseek_training.continual.held_out_units import HeldOutUnits
    from deepseek_training.data.texts import load_texts

    units = HeldOutUnits.prepare("notes", load_texts(data, "validation"), tokenizer, None)
    half = units.half("decide")
    bits = units.measure(model, sequence_length=64, batch_size=3)
    assert bits[half].sum() / units.num_bytes[half].sum() == pytest.approx(finding["after"], rel=1e-4)
    assert finding["n"] == half.sum()


@pytest.mark.parametrize("method", ["lora", "esft"])
def test_other_methods(run, texts, capsys, method):
    base = weights(run / "model")
    code = call(run, texts / "notes.jsonl", "--method", method, "--min-order-errors", "null", "--max-loss", "0.2")
    assert code == 0, capsys.readouterr()
    new = weights(run / "current")
    moved = {name for name in base if not torch.equal(base[name], new[name])}
    if method == "esft":
        assert moved and all(".mlp.experts." in name for name in moved)
    else:
        assert any("self_attn" in name for name in moved) and "model.embed_tokens.weight" not in moved


@pytest.mark.parametrize(("poison", "kind"), [("heap", "order"), ("abuse", "text")])
def test_poison_is_refused_and_the_old_model_stays(run, texts, capsys, poison, kind):
    base = weights(run / "model")
    assert call(run, texts / f"{poison}.jsonl") == 3
    told, found = gates(run), capsys.readouterr().out
    failed = {one["kind"] for one in told["findings"] if not one["passed"]}
    assert kind in failed and not told["accepted"] and told["why"]
    assert "refused" in found and told["why"][0] in found
    assert is_same(base, weights(run / "current")) and current_model(run) == run / "model"
    assert RunFolder(run / "updates" / "0001").is_finished and not (run / "updates" / "0001" / "model").exists()


def test_what_an_update_would_forget_is_refused(run, texts, capsys):
    """Without replay and all the way the tales are lost."""
    assert call(run, texts / "notes.jsonl", "--replay-share", "0", "--alphas", "[1.0]") == 3
    (loss,) = [one for one in gates(run)["findings"] if one["kind"] == "loss"]
    assert not loss["passed"] and loss["value"] > 0.05 and "tales: lost" in gates(run)["why"][0]


STEPS = (
    (stage, "save_trained"),
    (stage, "candidate_folder"),
    (stage, "write_json"),
    (stage, "keep_candidate"),
    (stage.Lesson, "learned"),
    (stage, "promote"),
    (in_force.os, "replace"),
    (RunFolder, "finish"),
    (stage, "clean"),
)


def killed(run, data, owner, name, *, is_after):
    """Run the command in a process that kills itself before or after a step; return whether it came there."""
    child = os.fork()
    if child == 0:
        original = getattr(owner, name)

        def step(*args, **kwargs):
            if name == "replace" and not (Path(args[0]).is_symlink() and "updates" in os.readlink(args[0])):
                return original(*args, **kwargs)
            if is_after:
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, step)
        code = call(run, data, *LEAN)
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_a_kill_anywhere_leaves_the_old_model_or_the_new(run, texts, tmp_path):
    whole = shutil.copytree(run, tmp_path / "whole", symlinks=True)
    assert call(whole, texts / "notes.jsonl", *LEAN) == 0
    base, new = weights(run / "model"), weights(whole / "current")
    started = None
    for owner, name in STEPS:
        for is_after in (False, True):
            # What has been trained once is taken from there: the steps behind it are what is cut.
            folder = shutil.copytree(started or run, tmp_path / f"{name}-{is_after}", symlinks=True)
            assert killed(folder, texts / "notes.jsonl", owner, name, is_after=is_after), name
            found = weights(current_model(folder))
            assert is_same(found, base) or is_same(found, new), (name, is_after)
            if (name, is_after) == ("save_trained", True):
                started = shutil.copytree(folder, tmp_path / "started", symlinks=True)
            finished = (folder / "updates" / "0001" / "summary.json").is_file()
            assert finished == (name == "clean" or (name == "finish" and is_after))
            if finished:
                assert is_same(found, new)
                continue
            assert call(folder, texts / "notes.jsonl", *LEAN) == 0, (name, is_after)
            assert is_same(weights(folder / "current"), new), (name, is_after)
            assert gates(folder) == gates(whole)
            shutil.rmtree(folder)


def test_rolled_back_between_promotion_and_its_record(run, texts):
    """Killed behind the rename, rolled back, and asked again: it stays rolled back."""
    assert killed(run, texts / "notes.jsonl", in_force.os, "replace", is_after=True)
    assert current_model(run) == run / "updates/0001/model"
    assert main(["update", str(run), "--discard"]) == 2
    assert main(["update", str(run), "--roll-back"]) == 0
    assert call(run, texts / "notes.jsonl", *LEAN) == 0
    assert current_model(run) == run / "model" and RunFolder(run / "updates/0001").is_finished


def test_ctrl_c_in_training_goes_on_or_is_discarded(run, texts, capsys, monkeypatch):
    original, calls = StageTrainer.training_step, [0]

    def stopped(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", stopped)
    assert call(run, texts / "notes.jsonl", *LEAN) == 130
    assert "run the same command again to go on from step 30" in capsys.readouterr().err
    assert current_model(run) == run / "model"
    assert call(run, texts / "heap.jsonl", *LEAN) == 2
    assert "was begun with other settings (data)" in capsys.readouterr().err
    copy = shutil.copytree(run, run.with_name("copy"), symlinks=True)
    assert main(["update", str(copy), "--discard"]) == 0
    assert not list((copy / "updates").glob("0*"))
    assert call(run, texts / "notes.jsonl", *LEAN) == 0
    assert current_model(run) == run / "updates/0001/model"


def test_one_process_at_a_time(run, texts, capsys):
    child = os.fork()
    if child == 0:
        with update_run.owning(run):
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    try:
        assert call(run, texts / "notes.jsonl") == 2
        assert "is being written by process" in capsys.readouterr().err
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_bad_input_is_one_line(run, texts, tmp_path, capsys):
    few = write(tmp_path / "few.jsonl", ["dose one of two"] * 3)
    rows = [json.loads(row) for row in (texts / "notes.jsonl").read_text().splitlines()]
    trained = tmp_path / "trained.jsonl"
    trained.write_text("".join(json.dumps({**row, "split": "train"}) + "\n" for row in rows))
    tales = [json.loads(row)["text"] for row in (texts / "tales.jsonl").read_text().splitlines()]
    mixed = [{"text": text, "split": "train"} for text in tales] + [{**row, "split": "validation"} for row in rows]
    overlap = tmp_path / "overlap.jsonl"
    overlap.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    good = str(texts / "notes.jsonl")
    for words, message in (
        ([str(run)], "--data: got none"),
        ([str(run), "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        ([str(run), "--data", str(few)], "few"),
        ([str(run), "--data", str(trained)], "validation"),
        ([str(run), "--data", str(overlap)], "tales"),
        ([str(run), "--data", good, "--alphas", "[0, 1]"], "alphas: got [0.0, 1.0], expected different numbers"),
        ([str(run), "--data", good, "--lora-rank", "4"], "lora_rank: got 4, expected 0 without method=lora"),
        ([str(run), "--data", good, "--sample-tokens", "4"], "sample"),
        ([str(run), "--roll-back", "--data", good], "--roll-back: got it with --data, expected it alone"),
        ([str(run), "--discard"], "--discard: got"),
        ([str(tmp_path / "no"), "--data", good], "expected the folder of a finished run"),
    ):
        try:
            assert main(["update", *words]) == 2, words
        except SystemExit as error:  # an unknown option
            assert error.code == 2
        (line,) = [row for row in capsys.readouterr().err.splitlines() if "error:" in row]
        assert message in line, line
    assert not list((run / "updates").glob("0*"))
