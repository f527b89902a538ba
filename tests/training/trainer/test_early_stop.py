"""Early stop on general text: the result is the model of the last measurement within the bound, also after a kill."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from deepseek_records.run_folder import RunFolder
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.stages.adapt import AdaptRecipe, adapt
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain


@pytest.fixture(scope="module")
def settings(tiny_settings, tiny_data, tmp_path_factory):
    """Lists of doses taught without replay, at a rate that makes the tales be forgotten within a few steps."""
    root = tmp_path_factory.mktemp("early")
    rows = [{"text": "\n".join(f"dose {j}: {(i * 7 + j) % 10} mg" for j in range(12))} for i in range(40)]
    (root / "doses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pretrain(build_recipe({**tiny_settings, "max_steps": 40}, PretrainRecipe), root / "base")
    kept = ("sequence_length", "batch_size", "eval_bytes", "report_to")
    return {
        **{key: tiny_settings[key] for key in kept},
        **{"model": str(root / "base" / "model"), "data": str(root / "doses.jsonl"), "general_data": str(tiny_data)},
        **{"replay_share": 0.0, "max_steps": 24, "learning_rate": 3e-3, "logging_steps": 1},
        **{"eval_steps": 2, "save_steps": 2, "warmup_steps": 0},
    }


def run(settings, folder):
    return adapt(build_recipe(settings, AdaptRecipe), folder)


def weights(folder):
    return load_file(RunFolder(folder).model_path / "model.safetensors")


@pytest.mark.parametrize("method", [{}, {"lora_rank": 4, "learning_rate": 3e-2}])
def test_the_result_is_the_model_of_the_last_measurement_within_the_bound(settings, tmp_path, method):
    summary = run({**settings, **method, "stop_general_loss": 0.01}, tmp_path / "stopped")
    values = {(row.dataset, row.when): row.value for row in summary.results}
    stopped, kept = summary.details["stopped_at_step"], summary.details["kept_step"]
    assert stopped == kept + 2 and values["tales", "after"] <= 1.01 * values["tales", "before"]
    assert summary.num_training_tokens == kept * 4 * 32
    measured = {
        row["step"]: row["eval_tales_bits_per_byte"]
        for row in RunFolder(tmp_path / "stopped").metrics
        if "eval_tales_bits_per_byte" in row
    }
    assert measured[stopped] > 1.01 * values["tales", "before"]
    assert all(value <= 1.01 * values["tales", "before"] for step, value in measured.items() if step < stopped)
    assert measured[kept] == values["tales", "after"]


@pytest.mark.slow
def test_a_bound_that_nothing_reaches_changes_nothing(settings, tmp_path):
    short = {**settings, "max_steps": 5}
    summary = run({**short, "stop_general_loss": 10.0}, tmp_path / "bound")
    run(short, tmp_path / "plain")
    assert summary.details == {"kept_step": 5, "stopped_at_step": None}
    plain, bound = weights(tmp_path / "plain"), weights(tmp_path / "bound")
    assert all(torch.equal(plain[name], bound[name]) for name in plain)


@pytest.mark.slow
def test_a_run_that_was_killed_behind_the_stop_ends_with_the_same_bits(settings, tmp_path):
    stopping = {**settings, "stop_general_loss": 0.01}
    details = run(stopping, tmp_path / "run").details
    whole = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "summary.json").unlink()
    assert run(stopping, tmp_path / "run").details == details
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "run").items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_steps": 0}, "stop_general_loss: got 0.01, expected null with eval_steps=0"),
        ({"stop_general_loss": -1.0}, "stop_general_loss: got -1.0, expected null or at least 0, and finite"),
        ({"expert_parallel_size": 2}, "stop_general_loss: got 0.01, expected null with expert_parallel_size=2"),
    ],
)
def test_what_cannot_stop_is_refused(settings, change, message):
    with pytest.raises(ValueError) as caught:
        build_recipe({**settings, "stop_general_loss": 0.01, **change}, AdaptRecipe)
    assert str(caught.value).startswith(message)
