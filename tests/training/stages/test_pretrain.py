import dataclasses
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from deepseek_records.run_folder import RunFolder
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain
from deepseek_training.trainer import run_start, stage_trainer
from deepseek_training.trainer.checkpoints import MARKER_FILE

# Figures of time and memory differ from run to run; everything else in the log must not.
CLOCKED = {"tokens_per_second", "peak_memory_gib", "mfu"}


def trace(run_path):
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in RunFolder(run_path).metrics]


def weights(run_path):
    return load_file(run_path / "model" / "model.safetensors")


def assert_same_run(first, second):
    assert trace(first) == trace(second)
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def finished(tiny_settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    summary = pretrain(build_recipe(tiny_settings, PretrainRecipe), path)
    return path, summary


def test_the_run_folder_is_whole(finished, tiny_settings):
    path, summary = finished
    run = RunFolder(path)
    assert run.is_finished and run.summary == summary
    assert run.settings["vocab_size"] == 300 and run.environment.command == "pretrain"
    assert [row["step"] for row in run.metrics if "loss" in row] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in run.metrics if "eval_tales_bits_per_byte" in row] == [4, 8, 12, 12]
    (result,) = summary.results
    assert result.metric == "bits_per_byte" and result.dataset == "tales" and result.stderr > 0
    assert result.value == run.metrics[-1]["eval_tales_bits_per_byte"]
    assert result.baseline_name == "interpolated bigram" and 1 < result.baseline < 8
    assert {row.used_for for row in summary.data} == {"training", "evaluation"}
    assert summary.samples[0].prompt == "The" and summary.num_training_tokens == 12 * 4 * 32


def test_the_model_learns_and_loads_by_the_auto_classes(finished):
    path, summary = finished
    losses = [row["loss"] for row in RunFolder(path).metrics if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path / "model")
    assert model.config.vocab_size == len(tokenizer) == summary.vocab_size
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_figures_count_every_routed_token(finished, tiny_settings):
    path, summary = finished
    rows = [row for row in RunFolder(path).metrics if "loss" in row]
    tokens = 2 * 4 * 32  # a window of two steps
    for row in rows:
        assert len(row["tokens_per_expert"]) == 2  # debug: three layers, the first one dense
        for layer, load in enumerate(row["tokens_per_expert"]):
            assert tokens * 1 <= sum(load) <= tokens * 3  # 1 to 3 of 8 experts per token
            assert row[f"load_imbalance_layer_{layer}"] == pytest.approx(max(load) / (sum(load) / 8))
        routed = sum(map(sum, row["tokens_per_expert"]))
        assert row["mean_experts_per_tok"] == pytest.approx(routed / 2 / tokens)
        assert row["num_idle_experts"] == sum(load.count(0) for load in row["tokens_per_expert"])
        assert 0 < row["router_entropy"] <= 2.08  # ln 8
        assert row["tokens_per_second"] > 0 and row["grad_norm"] > 0 and 0 < row["mfu"] < 1
    for name in ("expert_load", "course"):
        assert (path / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert [list(load) for load in summary.tokens_per_expert] == rows[-1]["tokens_per_expert"]


class Stop(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# Between two checkpoints; before the first, and after the last step.
@pytest.mark.parametrize("step", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 12))])
def test_an_interrupted_run_ends_like_a_whole_one(finished, tiny_settings, tmp_path, monkeypatch, caplog, step):
    recipe = build_recipe(tiny_settings, PretrainRecipe)
    with monkeypatch.context() as patch:
        original = stage_trainer.StageTrainer.__init__

        def with_stop(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.add_callback(Stop(step))

        patch.setattr(stage_trainer.StageTrainer, "__init__", with_stop)
        with pytest.raises(KeyboardInterrupt, match="run the same command again to go on from"):
            pretrain(recipe, tmp_path / "run")
    assert not RunFolder(tmp_path / "run").is_finished
    pretrain(recipe, tmp_path / "run")
    assert_same_run(finished[0], tmp_path / "run")


def test_a_run_stopped_after_its_last_step_trains_no_further(finished, tiny_settings, tmp_path):
    import shutil

    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    summary = pretrain(build_recipe(tiny_settings, PretrainRecipe), tmp_path / "run")
    assert_same_run(finished[0], tmp_path / "run")
    assert summary.tokens_per_expert == finished[1].tokens_per_expert
    assert summary.results == finished[1].results and summary.samples == finished[1].samples


def test_a_checkpoint_cut_short_is_passed_over(finished, tiny_settings, tmp_path, caplog):
    """The newest checkpoint lacks its marker, as after a kill while it was written; the one before is taken."""
    import shutil

    recipe = build_recipe(tiny_settings, PretrainRecipe)
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "summary.json").unlink()
    (run / "checkpoints" / "checkpoint-12" / MARKER_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        pretrain(recipe, run)
    assert "checkpoint-12 is incomplete" in caplog.text
    assert_same_run(finished[0], run)


@pytest.mark.slow  # tests/training/balance/test_invariances.py compares whole runs, with routers
def test_gradient_accumulation_gives_the_same_losses(tiny_settings, tmp_path):
    whole = {**tiny_settings, "max_steps": 6, "model": {"router_bias_update_speed": 0.01}}  # no dropout: other draws
    split = {**whole, "batch_size": 2, "gradient_accumulation_steps": 2}
    losses = []
    for number, settings in enumerate((whole, split)):
        pretrain(build_recipe(settings, PretrainRecipe), tmp_path / str(number))
        losses.append([row["loss"] for row in RunFolder(tmp_path / str(number)).metrics if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 4096}, "sequence_length: got 4096, expected at most the model's context"),
        ({"model": {"num_experts_per_tok": 9}}, "num_experts_per_tok"),
        ({"model": {"min_experts_per_tok": 5}}, "min_experts_per_tok"),
        ({"model": {"hiden_size": 9}}, "did you mean hidden_size"),
        ({"preset": "debgu"}, "preset: got 'debgu', expected one of"),
        ({"vocab_size": 100}, "vocab_size: got 100, expected in 259"),
        ({"experts_implementation": "fussed_moe"}, "did you mean fused_moe"),
        ({"data_column": "body"}, "has no column 'body'"),
    ],
)
def test_bad_settings_fail_in_one_line_and_leave_no_run(tiny_settings, tmp_path, change, message):
    with pytest.raises(ValueError) as error:
        pretrain(build_recipe({**tiny_settings, **change}, PretrainRecipe), tmp_path / "run")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_run_is_not_overwritten(finished, tiny_settings):
    recipe = build_recipe({**tiny_settings, "seed": 5}, PretrainRecipe)
    with pytest.raises(FileExistsError, match="holds a finished run"):
        pretrain(recipe, finished[0])
    assert dataclasses.asdict(recipe)["seed"] == 5


def test_trackio_is_used_where_it_is_installed(tiny_settings, monkeypatch):
    recipe = build_recipe({**tiny_settings, "report_to": None}, PretrainRecipe)
    for found in (None, object()):
        monkeypatch.setattr(run_start.importlib.util, "find_spec", lambda name, found=found: found)
        assert run_start.choose_trackers(recipe) == (["trackio"] if found else [])
    monkeypatch.setattr(run_start, "get_available_reporting_integrations", lambda: ["mlflow"])
    for name, is_taken in (("mlflow", True), ("wandb", False)):
        named = build_recipe({**tiny_settings, "report_to": [name]}, PretrainRecipe)
        if is_taken:
            assert run_start.choose_trackers(named) == [name]
            continue
        with pytest.raises(ValueError, match=r"report_to: got 'wandb', expected .*\(mlflow\)"):
            run_start.choose_trackers(named)
