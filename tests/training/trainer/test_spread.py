"""What of a run's processes may change when it goes on, and what is refused in one line."""

import contextlib
from types import SimpleNamespace

import pytest

from deepseek_records.run_folder import RunFolder
from deepseek_training.recipes.loading import recipe_settings
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe
from deepseek_training.recipes.rewarded import RewardedSettings
from deepseek_training.trainer.run_start import open_run
from deepseek_training.trainer.spread import check_writer, hold_step, rows_per_step, write_writer

SETTINGS = {"max_steps": 10, "learning_rate": 1e-3}


class Arguments(SimpleNamespace):
    """Of a training in `world_size` processes, seen from the first."""

    process_index = 0
    output_dir = "nowhere"

    def main_process_first(self, local):
        return contextlib.nullcontext()


def trainer_of(engine, processes=2):
    names = {"fsdp2": "is_fsdp_enabled", "fsdp2_sharded": "is_fsdp_enabled", "zero3": "is_deepspeed_enabled"}
    flags = dict.fromkeys(names.values(), False)
    if engine in names:
        flags[names[engine]] = True
    flags["writes_parts"] = engine in ("fsdp2_sharded", "expert_parallel")
    return SimpleNamespace(**flags, is_sharded=engine != "whole", args=SimpleNamespace(world_size=processes))


def begin(tmp_path, processes, **settings):
    recipe = PretrainRecipe(**SETTINGS, **settings)
    run = open_run(recipe, tmp_path / "run", Arguments(world_size=processes), command="pretrain")
    (run.path / "metrics.jsonl").write_text('{"step": 0}\n')  # has begun in earnest
    return run


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (4, {"batch_size": 2, "gradient_accumulation_steps": 1}),
        (1, {"batch_size": 4, "gradient_accumulation_steps": 2}),
        (2, {"batch_size": 4, "gradient_accumulation_steps": 1, "expert_parallel_size": 2}),
    ],
)
def test_a_step_may_be_spread_otherwise(processes, settings, tmp_path):
    begin(tmp_path, 2, batch_size=2, gradient_accumulation_steps=2)
    again = PretrainRecipe(**SETTINGS, **settings)
    assert rows_per_step(again, Arguments(world_size=processes)) == 8
    assert open_run(again, tmp_path / "run", Arguments(world_size=processes), command="pretrain").is_resumed


def test_another_number_of_rows_is_refused_though_no_setting_differs(tmp_path):
    begin(tmp_path, 2, batch_size=2)
    recipe = PretrainRecipe(**SETTINGS, batch_size=2)
    with pytest.raises(FileExistsError, match=r"batch_size: got 8 rows per step .* expected 4, with which"):
        open_run(recipe, tmp_path / "run", Arguments(world_size=4), command="pretrain")


def test_other_settings_still_make_another_run(tmp_path):
    run = begin(tmp_path, 2, batch_size=2)
    settings = recipe_settings(PretrainRecipe(**{**SETTINGS, "learning_rate": 2e-3}, batch_size=1))
    with pytest.raises(FileExistsError, match=r"it differs in learning_rate\)"):
        RunFolder.check(run.path, settings, free=("batch_size",))


def test_a_run_of_an_earlier_version_is_held_from_now_on(tmp_path):
    run = begin(tmp_path, 2, batch_size=2)
    (run.path / "inputs.json").unlink()
    hold_step(run, PretrainRecipe(**SETTINGS, batch_size=8), Arguments(world_size=1))
    assert run.inputs["rows_per_step"] == "8"


def test_rewarded_stages_count_prompts():
    assert rows_per_step(RewardedSettings(model="x", batch_size=6), Arguments(world_size=3)) == 18


@pytest.mark.parametrize(
    ("wrote", "goes_on", "message"),
    [
        (("fsdp2", 2), ("whole", 2), "engine: got whole, expected fsdp2, which wrote"),
        (("whole", 2), ("expert_parallel", 2), "engine: got expert_parallel, expected whole"),
        (("fsdp2", 2), ("fsdp2_sharded", 2), "engine: got fsdp2_sharded, expected fsdp2, which wrote"),
        (("zero3", 2), ("zero3", 4), "processes: got 4, expected 2, which wrote"),
    ],
)
def test_what_an_engine_cannot_load_is_refused(wrote, goes_on, message, tmp_path):
    write_writer(tmp_path, trainer_of(*wrote))
    with pytest.raises(ValueError, match=message):
        check_writer(tmp_path, trainer_of(*goes_on))


@pytest.mark.parametrize("engine", ["whole", "fsdp2", "fsdp2_sharded", "expert_parallel"])
def test_other_engines_take_any_number_of_processes(engine, tmp_path):
    check_writer(tmp_path, trainer_of(engine))  # nothing is said there
    write_writer(tmp_path, trainer_of(engine, 2))
    check_writer(tmp_path, trainer_of(engine, 4))
