"""The KL weight that adapts to a target, the bound that ends a training, and trackers."""

import pytest
from transformers import TrainerCallback, integrations

from deepseek_cli.main import main
from deepseek_records.run_folder import RunFolder
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.loading import load_recipe
from deepseek_training.stages.align import align
from deepseek_training.trainer import run_start


def make_recipe(policy_path, **settings):
    return load_recipe("align-debug", AlignRecipe, {"model": str(policy_path), "learning_rate": 0.01, **settings})


def weights(path):
    return [row["kl_coef"] for row in RunFolder(path).metrics if "kl_coef" in row]


def test_the_weight_follows_the_target(policy_path, tmp_path):
    align(make_recipe(policy_path, num_updates=4, kl_coef=0.1, target_kl=1e-9), tmp_path / "near")
    measured = [row["kl"] for row in RunFolder(tmp_path / "near").metrics if "kl_coef" in row]
    expected = [0.1]
    for kl in measured[:-1]:
        expected.append(expected[-1] * (1 + min(0.2, max(-0.2, kl / 1e-9 - 1))))
    assert weights(tmp_path / "near") == pytest.approx(expected) and expected[-1] > 0.1


@pytest.mark.slow
def test_a_resumed_training_has_the_same_weight(policy_path, tmp_path, monkeypatch):
    from deepseek_training.ppo.trainer import CorrectedPPOTrainer

    recipe = make_recipe(policy_path, num_updates=12, target_kl=1e-9)
    align(recipe, tmp_path / "whole")
    step = CorrectedPPOTrainer._train_step

    def stop(self, update):
        if update == 12:
            raise KeyboardInterrupt
        step(self, update)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CorrectedPPOTrainer, "_train_step", stop)
        align(recipe, tmp_path / "cut")
    align(recipe, tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_it_ends_where_it_is_too_far(policy_path, tmp_path):
    summary = align(make_recipe(policy_path, num_updates=4, stop_kl=1e-6), tmp_path / "run")
    rows = [row for row in RunFolder(tmp_path / "run").metrics if "episode" in row]
    assert len(rows) < 4 and rows[-1]["kl"] > 1e-6 and all(row["kl"] <= 1e-6 for row in rows[:-1])
    assert summary.results


class Tracker(TrainerCallback):
    """Stands for a tracker of transformers'."""

    seen: list[dict] = []  # noqa: RUF012

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_trackers_get_what_is_logged(policy_path, tmp_path, monkeypatch):
    monkeypatch.setitem(integrations.integration_utils.INTEGRATION_TO_CALLBACK, "mine", Tracker)
    monkeypatch.setattr(run_start, "get_available_reporting_integrations", lambda: ["mine"])
    align(make_recipe(policy_path, report_to=["mine"]), tmp_path / "run")
    assert sum("objective/kl" in row for row in Tracker.seen) == 2
    assert any("reward_relevance" in row for row in Tracker.seen)


@pytest.mark.parametrize("command", ["align", "pretrain"])
def test_a_tracker_that_is_not_installed_is_one_line(policy_path, tmp_path, capsys, command):
    model = ["--model", str(policy_path)] if command == "align" else []
    assert (
        main([command, f"{command}-debug", *model, "--report-to", "[nothing]", "--output", str(tmp_path / "r")]) == 2
    )
    assert "report_to: got 'nothing', expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings", [{"target_kl": 0.0}, {"stop_kl": -1.0}, {"target_kl": 1.0, "kl_coef": 0.0}, {"stop_kl": float("inf")}]
)
def test_settings_that_cannot_work(settings):
    with pytest.raises(ValueError, match=r"target_kl|stop_kl"):
        AlignRecipe(model="m", **settings)
