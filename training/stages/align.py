"""Stage 3: align a model with PPO under a weighted reward.

``deepseek-moe align`` and the demo call `align`. The run folder keeps policy (``model/``), value model and reference,
a row of metrics per update, and the held-out prompts' rewards before and after.
"""

import contextlib
import time
from pathlib import Path

from deepseek_records.loading import check_vocabulary, load_tokenizer
from deepseek_records.summary import Summary
from deepseek_training.balance.router_replay import check_router_replay
from deepseek_training.data.prompts import check_enough, load_prompts, prompt_texts
from deepseek_training.data.texts import describe_data
from deepseek_training.launch.plan import announce
from deepseek_training.launch.plan_alignment import plan_alignment
from deepseek_training.ppo.assembly import build_reward, build_trainer, load_models, ppo_config
from deepseek_training.ppo.checkpoint import last_checkpoint
from deepseek_training.ppo.outcome import (
    evaluate_once,
    gain_check,
    measure_gain,
    pair_samples,
    reward_rows,
    sampler,
    save_models,
)
from deepseek_training.ppo.reward_bar import RewardBar
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.trainer.distributed_engine import building_as_configured
from deepseek_training.trainer.inputs_held import hold_inputs
from deepseek_training.trainer.interruption import leaving_a_checkpoint, train_until_stopped
from deepseek_training.trainer.run_start import open_run
from deepseek_training.trainer.sample_log import SampleLog, samples_over_time

__all__ = ["AlignRecipe", "align"]


def align(recipe: AlignRecipe, output: str | Path, *, overwrite: bool = False, is_dry: bool = False) -> Summary | None:
    """Align a model and return the summary, also written to the run folder.

    Args:
        recipe: The settings.
        output: The run folder; an unfinished run with equal settings goes on from its last checkpoint.
        overwrite: Delete whatever run the folder holds.
        is_dry: Print what would happen, what it needs and how long it takes, write nothing, and return None.

    Raises:
        ValueError: A setting or a prompt that cannot work.
        FileNotFoundError: No such model or prompts.
        FileExistsError: The folder holds something else.
        RewardError: The reward failed in mid-run; the run can be taken up again.
    """
    started = time.time()
    reward = build_reward(recipe)
    tokenizer = load_tokenizer(recipe.model)
    train, validation = (load_prompts(recipe, tokenizer, split) for split in ("train", "validation"))
    held_out = validation.select(range(min(recipe.num_eval_prompts, len(validation))))
    args = ppo_config(recipe, Path(output))
    check_enough(recipe, train, args.world_size)
    with building_as_configured(args):
        policy, value_model = load_models(recipe, is_dry=is_dry)  # a bad path leaves no run folder behind
    check_vocabulary(policy, tokenizer)
    check_router_replay(policy, recipe.router_replay)
    run = open_run(recipe, output, args, command="align", overwrite=overwrite, is_dry=is_dry)
    plan = plan_alignment(recipe, args, policy, value_model, tokenizer, train, held_out, reward)
    announce(plan, run.path, is_first=args.process_index == 0, is_dry=is_dry)
    if is_dry:
        return None
    models = {"model": policy, "value_model": value_model, "processing_class": tokenizer, "reward": reward}
    bar = RewardBar("align")
    trainer = build_trainer(recipe, args, run, bar, train_dataset=train, eval_dataset=held_out, **models)
    trainer.add_callback(SampleLog(run, recipe.sample_steps, sampler(trainer, held_out)))
    hold_inputs(run, args, data=train, held_out=held_out, model=policy)
    with leaving_a_checkpoint(trainer, run):
        before = evaluate_once(trainer, run)
        with contextlib.closing(bar):
            train_until_stopped(trainer, last_checkpoint(args.output_dir))
        trainer.evaluate(metric_key_prefix="after")
        after = trainer.last_evaluation
        gain = measure_gain(before["reward"], after["reward"])
        summary = Summary(
            stage="align",
            results=reward_rows(recipe.prompts, "before", before) + reward_rows(recipe.prompts, "after", after),
            gain=gain,
            data=(
                describe_data(recipe.prompts, "train", prompt_texts(train), "training"),
                describe_data(recipe.prompts, "validation", prompt_texts(held_out), "evaluation"),
            ),
            checks=() if recipe.min_gain_stderr is None else (gain_check(gain, recipe.min_gain_stderr),),
            samples=samples_over_time(run) + pair_samples(prompt_texts(held_out), before, after),
            seconds=time.time() - started,
        )
        save_models(trainer, run, tokenizer)
        if trainer.accelerator.is_main_process:
            summary = run.finish(summary)
    trainer.accelerator.wait_for_everyone()
    return summary
