"""A training that diverges says so in one line, and leaves no weights behind that are not finite."""

import pytest
import torch
from safetensors.torch import load_file

from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.loading import load_recipe
from deepseek_training.stages.adapt import AdaptRecipe, adapt
from deepseek_training.stages.align import align
from deepseek_training.trainer.divergence import refuse_divergence

TOO_FAST = 1e12  # Adam moves every weight by this at the first step.


@pytest.fixture
def settings(policy_path, tiny_data, tmp_path):
    general = tmp_path / "general.txt"
    general.write_text(tiny_data.read_text()[:20_000].replace("\\n", "\n"))
    small = {"sequence_length": 32, "batch_size": 4, "max_steps": 6, "warmup_steps": 0, "sample_tokens": 3}
    rates = {"learning_rate": TOO_FAST, "logging_steps": 1, "save_steps": 1, "eval_bytes": 1000, "report_to": []}
    texts = {"data": str(tiny_data), "general_data": str(general)}
    return {"model": str(policy_path), **texts, **small, **rates}


def saved_weights(folder):
    return [tensor for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()]


def test_it_stops_at_the_first_bad_line_and_saves_nothing_of_it(settings, tmp_path, capsys):
    with pytest.raises(
        ValueError, match=r"training: .* \(first in the output of .*layers\.0 at step \d\), before .* \(now 1e\+12\)"
    ):
        adapt(load_recipe("adapt-debug", AdaptRecipe, settings), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    assert all(tensor.isfinite().all() for tensor in saved_weights(tmp_path / "run"))
    assert "nan" not in (tmp_path / "run" / "metrics.jsonl").read_text().lower()
    assert capsys.readouterr().err.endswith("\n"), "the bar is closed"


def test_between_two_lines_the_measurement_notices(settings, tmp_path):
    settings |= {"logging_steps": 50, "save_steps": 0}
    with pytest.raises(ValueError, match="bits per byte: the model's losses are NaN or infinite"):
        adapt(load_recipe("adapt-debug", AdaptRecipe, settings), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_ppo_stops_too(policy_path, tmp_path):
    recipe = load_recipe("align-debug", AlignRecipe, {"model": str(policy_path), "learning_rate": TOO_FAST})
    with pytest.raises(ValueError, match=r"training: .* at step 1, before"):
        align(recipe, tmp_path / "run")
    assert "nan" not in (tmp_path / "run" / "metrics.jsonl").read_text().lower()


def test_weights_burst_before_the_figures_do():
    model = torch.nn.Linear(2, 2)
    refuse_divergence(model, 1, 0.1, {"loss": 1.0})
    model.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="training: the weights are no longer finite at step 1"):
        refuse_divergence(model, 1, 0.1, {"loss": 1.0})
