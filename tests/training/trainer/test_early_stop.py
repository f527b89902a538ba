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
from deepseek_training.trainer.early_stop import StopAtForgetting


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


@pytest.mark.slow
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


def looks_of(folder):
    """General bits per byte by step, of the measurements while training."""
    name = "eval_tales_bits_per_byte"
    return {row["step"]: row[name] for row in RunFolder(folder).metrics if name in row and row["step"]}


def expected(above, patience):
    """Kept step and step of the stop, by counting."""
    kept, in_a_row = 0, 0
    for step, is_above in above.items():
        kept, in_a_row = (kept, in_a_row + 1) if is_above else (step, 0)
        if in_a_row > patience or (is_above and step == max(above)):
            return {"kept_step": kept, "stopped_at_step": step}
    return {"kept_step": kept, "stopped_at_step": None}


@pytest.mark.slow
def test_patience_lets_a_loss_come_back(settings, tmp_path):
    """A high rate that falls to nothing, with much replay: the loss rises above the bound at once, and returns."""
    back = {**settings, "learning_rate": 2e-2, "replay_share": 0.7, "min_learning_rate_share": 0.0}
    plain = run(back, tmp_path / "plain")
    before = next(row.value for row in plain.results if (row.dataset, row.when) == ("tales", "before"))
    looks = looks_of(tmp_path / "plain")
    assert list(looks) == list(range(2, 25, 2)) and looks[2] > looks[24] > before, looks
    bound = looks[24] / before - 1 + 1e-6
    above = {step: value / before - 1 > bound for step, value in looks.items()}
    enough = next(patience for patience in range(12) if expected(above, patience)["stopped_at_step"] is None)
    assert enough > 0
    for patience in {0, enough - 1, enough}:
        stopping = {**back, "stop_general_loss": bound, "stop_patience": patience}
        assert run(stopping, tmp_path / str(patience)).details == expected(above, patience)
    ours, whole = weights(tmp_path / str(enough)), weights(tmp_path / "plain")
    assert all(torch.equal(ours[name], whole[name]) for name in ours)


@pytest.mark.slow
def test_a_run_killed_while_it_waits_stops_where_one_left_alone_does(settings, tmp_path, monkeypatch):
    stopping = {**settings, "stop_general_loss": 0.01, "stop_patience": 2}
    details = run(stopping, tmp_path / "whole").details
    first_above = details["stopped_at_step"] - 4
    assert first_above > 0

    class Killed(Exception):
        pass

    original = StopAtForgetting.on_evaluate

    def kill(self, args, state, *rest, **values):
        found = original(self, args, state, *rest, **values)
        if state.global_step == first_above + 2:  # two looks above; the checkpoint knows of one
            raise Killed
        return found

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StopAtForgetting, "on_evaluate", kill)
        run(stopping, tmp_path / "killed")
    assert run(stopping, tmp_path / "killed").details == details
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "killed").items())


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
        ({"stop_patience": -1}, "stop_patience: got -1, expected at least 0"),
        (
            {"stop_general_loss": None, "stop_patience": 2},
            "stop_patience: got 2, expected 0 with stop_general_loss=null",
        ),
        ({"stop_patience": 12}, "stop_patience: got 12, expected below the number of measurements, 12"),
        ({"expert_parallel_size": 2}, "stop_general_loss: got 0.01, expected null with expert_parallel_size=2"),
    ],
)
def test_what_cannot_stop_is_refused(settings, change, message):
    with pytest.raises(ValueError) as caught:
        build_recipe({**settings, "stop_general_loss": 0.01, **change}, AdaptRecipe)
    assert str(caught.value).startswith(message)
