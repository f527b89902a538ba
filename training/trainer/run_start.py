"""How a stage begins: the trainer's arguments from its recipe, and the run folder, made or taken up again."""

import importlib.util
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from deepseek_records.activation_checkpointing import checkpointing_setting
from deepseek_records.run_folder import RunFolder
from deepseek_training.recipes.loading import recipe_settings
from deepseek_training.recipes.pretrain_and_adapt import TrainerSettings
from deepseek_training.recipes.rewarded import RewardedSettings
from deepseek_training.trainer.checkpoints import last_complete_checkpoint, step_of
from deepseek_training.trainer.distributed_engine import prepare_engine
from deepseek_training.trainer.run_callbacks import drop_metrics_after
from deepseek_training.trainer.sample_log import drop_samples_after
from deepseek_training.trainer.spread import SPREAD_SETTINGS, hold_step


def open_run(
    recipe: TrainerSettings | RewardedSettings,
    output: str | Path,
    args: TrainingArguments,
    *,
    command: str,
    overwrite: bool = False,
    is_dry: bool = False,
) -> RunFolder:
    """Return the run folder of a stage; of several processes the first makes it.

    A run that was begun before loses the log lines after its last complete checkpoint: they are written again.

    Args:
        recipe: The settings.
        output: The folder.
        args: The trainer's arguments, which know the processes.
        command: The subcommand.
        overwrite: Delete whatever run the folder holds.
        is_dry: Check the folder only, and write nothing.

    Raises:
        FileExistsError: The folder holds another run.
    """
    settings, free = recipe_settings(recipe), SPREAD_SETTINGS if isinstance(recipe, TrainerSettings) else ()
    if is_dry:
        return RunFolder(output) if overwrite else RunFolder.check(output, settings, free=free)
    with args.main_process_first(local=False):
        if args.process_index > 0:
            run = RunFolder.join(output, settings, free=free)
            hold_step(run, recipe, args)
            return run
        run = RunFolder.create(output, settings, command=command, seed=recipe.seed, overwrite=overwrite, free=free)
        hold_step(run, recipe, args)
        checkpoint = last_complete_checkpoint(Path(args.output_dir))
        if run.is_resumed:
            step = step_of(checkpoint) if checkpoint else 0
            drop_metrics_after(run, step)
            drop_samples_after(run, step)
    return run


def choose_trackers(recipe: TrainerSettings | RewardedSettings) -> list[str]:
    """Return the recipe's trackers, else trackio where it is installed, which needs no account or network.

    Raises:
        ValueError: One is unknown or not installed.
    """
    if recipe.report_to is not None:
        installed = get_available_reporting_integrations()
        for name in recipe.report_to:
            if name not in installed:
                found = ", ".join(installed) or "none is"
                raise ValueError(f"report_to: got {name!r}, expected trackers that are installed ({found})")
        return recipe.report_to
    return ["trackio"] if importlib.util.find_spec("trackio") else []


def training_arguments(recipe: TrainerSettings, output: Path) -> TrainingArguments:
    """Return the trainer's arguments for a recipe.

    Args:
        recipe: The settings.
        output: The run folder; checkpoints go into it.
    """
    has_gpu = torch.cuda.is_available()
    return TrainingArguments(
        accelerator_config=prepare_engine(recipe.collective_timeout_s),
        ddp_timeout=recipe.collective_timeout_s,
        output_dir=str(output / "checkpoints"),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_learning_rate_share},
        warmup_steps=recipe.warmup_steps,
        optim="adamw_torch",
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        **checkpointing_setting(recipe.gradient_checkpointing),
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.eval_steps else "no",
        eval_steps=recipe.eval_steps or None,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or recipe.max_steps,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=not has_gpu,
        dataloader_pin_memory=has_gpu,
        remove_unused_columns=False,
        disable_tqdm=True,  # `ProgressBar` replaces it
        project="deepseek-moe",
        run_name=f"{output.parent.name}-{output.name}",
        report_to=choose_trackers(recipe) or "none",
    )
