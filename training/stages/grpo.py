"""Align a model with GRPO by TRL, under the same rewards as `align`, in the same run folder.

``deepseek-moe grpo`` calls `grpo`. TRL plays and learns; here are prompts, reward, measurement and resume. A run that
was interrupted goes on from its last checkpoint; what it samples then is not what it would have sampled.
"""

import time
from pathlib import Path

from deepseek_records.loading import check_vocabulary, load_tokenizer
from deepseek_records.summary import Summary
from deepseek_training.balance.bias_speed import check_bias_speed
from deepseek_training.balance.router_replay import check_router_replay
from deepseek_training.data.prompts import load_prompts, prompt_texts
from deepseek_training.data.texts import describe_data
from deepseek_training.launch.plan import announce, load_or_outline
from deepseek_training.launch.plan_alignment import plan_group_updates
from deepseek_training.ppo.assembly import build_reward
from deepseek_training.ppo.outcome import gain_check, measure_gain, pair_samples, reward_rows
from deepseek_training.recipes.grpo import GrpoRecipe
from deepseek_training.trainer.distributed_engine import building_as_configured, refuse_fsdp, refuse_split_adapter
from deepseek_training.trainer.interruption import leaving_a_checkpoint
from deepseek_training.trainer.lora import with_lora
from deepseek_training.trainer.preference_trainers import GrpoStageTrainer, grpo_config
from deepseek_training.trainer.rewarded_policy import complete_and_score, measure_before
from deepseek_training.trainer.run_start import open_run
from deepseek_training.trainer.stage_trainer import run_training
from deepseek_training.trainer.whole_weights import whole_weights

__all__ = ["GrpoRecipe", "grpo"]


def grpo(recipe: GrpoRecipe, output: str | Path, *, overwrite: bool = False, is_dry: bool = False) -> Summary | None:
    """Align a model and return the summary.

    Args:
        recipe: The settings.
        output: The run folder; an unfinished run with equal settings goes on from its last complete checkpoint.
        overwrite: Delete whatever run the folder holds.
        is_dry: Print what would happen and what it needs, write nothing, and return None.

    Raises:
        ValueError: A setting or a prompt that cannot work.
        FileNotFoundError: No such model or prompts.
        FileExistsError: The folder holds something else.
    """
    started = time.monotonic()
    refuse_fsdp("grpo")
    refuse_split_adapter(recipe.lora_rank, "grpo")
    reward = build_reward(recipe)
    tokenizer = load_tokenizer(recipe.model)
    train, validation = (load_prompts(recipe, tokenizer, split) for split in ("train", "validation"))
    held_out = validation.select(range(min(recipe.num_eval_prompts, len(validation))))
    options = {"experts_implementation": recipe.experts_implementation} if recipe.experts_implementation else {}
    args = grpo_config(recipe, Path(output))
    with building_as_configured(args):
        model = load_or_outline(recipe.model, is_dry=is_dry, **options)
    check_vocabulary(model, tokenizer)
    check_bias_speed(model, recipe.bias_update_speed)
    check_router_replay(model, recipe.router_replay)
    model = with_lora(model, recipe)
    run = open_run(recipe, output, args, command="grpo", overwrite=overwrite, is_dry=is_dry)
    plan = plan_group_updates(recipe, args, model, len(train), len(held_out))
    announce(plan, run.path, is_first=args.process_index == 0, is_dry=is_dry)
    if is_dry:
        return None
    parts = {"reward_funcs": reward, "args": args, "train_dataset": train, "processing_class": tokenizer}
    trainer = GrpoStageTrainer(recipe, model=model, **parts)
    with leaving_a_checkpoint(trainer, run):
        policy = trainer.accelerator.unwrap_model(trainer.model)
        before = measure_before(run, lambda: complete_and_score(policy, tokenizer, held_out, reward, recipe))
        run_training(trainer, run)
        with whole_weights(trainer.model_wrapped, trainer.accelerator):
            after = complete_and_score(policy, tokenizer, held_out, reward, recipe)
        gain = measure_gain(before["reward"], after["reward"])
        trainer.save_result(run, tokenizer)
        summary = Summary(
            stage="grpo",
            base_model=recipe.model,
            results=reward_rows(recipe.prompts, "before", before) + reward_rows(recipe.prompts, "after", after),
            gain=gain,
            data=(
                describe_data(recipe.prompts, "train", prompt_texts(train), "training"),
                describe_data(recipe.prompts, "validation", prompt_texts(held_out), "evaluation"),
            ),
            checks=() if recipe.min_gain_stderr is None else (gain_check(gain, recipe.min_gain_stderr),),
            samples=pair_samples(prompt_texts(held_out), before, after),
            seconds=round(time.monotonic() - started, 1),
        )
        if trainer.is_first:
            summary = run.finish(summary)
    return summary
