"""Samples over time: written every so many steps, shown in the report, and without a trace in the training."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from deepseek_cli.main import main
from deepseek_model_cards.report.report import write_report
from deepseek_records.run_folder import RunFolder
from deepseek_training.recipes.loading import build_recipe, load_recipe
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe
from deepseek_training.stages.pretrain import pretrain
from deepseek_training.trainer.sample_log import SAMPLES_FILE, drop_samples_after, samples_over_time

PROMPTS = ["Once upon", "The old man"]
SETTINGS = {"max_steps": 6, "save_steps": 0, "eval_steps": 0, "sample_prompts": PROMPTS}


@pytest.fixture(scope="module")
def runs(tiny_settings, tmp_path_factory):
    """The same training with samples every two steps, and without."""
    root = tmp_path_factory.mktemp("runs")
    for name, every in (("sampled", 2), ("plain", 0)):
        settings = {**tiny_settings, **SETTINGS, "sample_steps": every}
        pretrain(build_recipe(settings, PretrainRecipe), root / name)
    return root


def test_samples_are_written_as_they_come_and_kept_in_the_summary(runs):
    rows = [json.loads(line) for line in (runs / "sampled" / SAMPLES_FILE).read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, one) for step in (2, 4) for one in PROMPTS]
    samples = RunFolder(runs / "sampled").summary.samples
    assert [(one.step, one.prompt) for one in samples] == [
        *((row["step"], row["prompt"]) for row in rows),
        *((None, one) for one in PROMPTS),
    ]
    assert len({one.completion for one in samples if one.prompt == PROMPTS[0]}) > 1


def test_the_training_is_bit_for_bit_the_same(runs):
    weights = [load_file(runs / name / "model/model.safetensors") for name in ("sampled", "plain")]
    assert all(value.equal(weights[1][key]) for key, value in weights[0].items())
    losses = [[row.get("loss") for row in RunFolder(runs / name).metrics] for name in ("sampled", "plain")]
    assert losses[0] == losses[1]
    assert not (runs / "plain" / SAMPLES_FILE).exists()
    last = [RunFolder(runs / name).summary.samples[-2:] for name in ("sampled", "plain")]
    assert last[0] == last[1]


def test_the_report_shows_them_by_step(runs):
    page = write_report(runs / "sampled", runs / "report.html").read_text()
    places = [page.index(words) for words in ("pretrain, step 2", "pretrain, step 4", "after pretrain")]
    assert places == sorted(places)


def test_a_resumed_run_writes_no_sample_twice(tmp_path):
    run = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "prompt": "a", "completion": "b"}) + "\n" for step in (2, 4, 6)]
    (tmp_path / SAMPLES_FILE).write_text("".join(lines) + '{"step": 8, "pro')
    assert [one.step for one in samples_over_time(run)] == [2, 4, 6]
    drop_samples_after(run, 4)
    assert (tmp_path / SAMPLES_FILE).read_text() == "".join(lines[:2])


@pytest.mark.parametrize("settings", [{"sample_steps": -1}, {"sample_steps": 1.5}])
def test_a_wrong_number_is_refused(settings):
    with pytest.raises(ValueError, match="sample_steps"):
        load_recipe("pretrain-debug", PretrainRecipe, settings)


# Words beside those of all, and the steps at which samples are due.
TEXT = "--max-steps 6 --logging-steps 1 --save-steps 0 --eval-steps 0 --warmup-steps 0 --sample-tokens 4"
STAGES = {
    "distill": (f"--teacher MODEL --data DATA --sample-prompts [The,A] {TEXT}", {2, 4}),
    "sft": (f"--model MODEL --sequence-length 128 {TEXT}", {2, 4}),
}
CLOCKED = ("second", "memory", "mfu", "time", "samples_per", "steps_per")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_other_stages_train_bit_for_bit_the_same(stage, policy_path, tiny_data, tmp_path):
    model = shutil.copytree(policy_path, tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    # With dropout a sample that moved the random state would change every later step.
    (model / "config.json").write_text(json.dumps({**settings, "hidden_dropout": 0.1}))
    words, steps = STAGES[stage]
    words = words.replace("MODEL", str(model)).replace("DATA", str(tiny_data)) + " --batch-size 4 --report-to []"
    for name, every in (("sampled", 2), ("plain", 0)):
        more = ["--sample-steps", str(every), "--output", str(tmp_path / name)]
        assert main([stage, f"{stage}-debug", *words.split(), *more]) in (0, 3)
    sampled, plain = (RunFolder(tmp_path / name) for name in ("sampled", "plain"))
    weights = [load_file(run.model_path / "model.safetensors") for run in (sampled, plain)]
    assert all(value.equal(weights[1][key]) for key, value in weights[0].items())
    rows = [
        [{key: value for key, value in row.items() if not any(word in key for word in CLOCKED)} for row in run.metrics]
        for run in (sampled, plain)
    ]
    assert rows[0] == rows[1] and len(rows[0]) >= 3
    assert sampled.summary.results == plain.summary.results
    at = [{one.step for one in run.summary.samples} for run in (sampled, plain)]
    assert at[0] - at[1] == steps
