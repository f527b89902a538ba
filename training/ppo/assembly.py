"""Puts PPO together from an align recipe: reward, models, TRL's settings and the trainer."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl.rewards import get_repetition_penalty_reward

from deepseek_records.activation_checkpointing import checkpointing_setting
from deepseek_records.loading import load_model
from deepseek_records.run_folder import RunFolder
from deepseek_training.balance.replay_callback import RouterReplayCallback
from deepseek_training.launch.plan import load_or_outline
from deepseek_training.ppo.kl_control import KlControl
from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.ppo.trainer import CorrectedPPOTrainer
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.rewarded import RewardedSettings
from deepseek_training.rewards import Diversity, Relevance, Safety, WeightedReward
from deepseek_training.rewards.model_reward import ModelReward
from deepseek_training.trainer.distributed_engine import (
    check_engine,
    prepare_engine,
    refuse_fsdp,
    refuse_split_adapter,
)
from deepseek_training.trainer.run_callbacks import MetricsFile
from deepseek_training.trainer.run_start import choose_trackers


def build_reward(recipe: RewardedSettings) -> WeightedReward:
    """Return the weighted reward of a recipe."""
    penalties = [get_repetition_penalty_reward(3, -recipe.repetition_penalty)] if recipe.repetition_penalty else []
    if recipe.reward_model is not None:
        return WeightedReward(
            [ModelReward(recipe.reward_model)],
            weights=[1.0],
            penalties=penalties,
            is_standardized=recipe.is_standardized,
        )
    return WeightedReward(
        [Relevance(), Safety(), Diversity()],
        weights=recipe.weights,
        gate=None if recipe.gate_threshold is None else "safety",
        gate_threshold=1.0 if recipe.gate_threshold is None else recipe.gate_threshold,
        penalties=penalties,
        is_standardized=recipe.is_standardized,
    )


def load_models(recipe: AlignRecipe, *, is_dry: bool = False) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Return the policy and the value model, None where LoRA lets it share the policy's weights.

    Args:
        recipe: The settings.
        is_dry: Whether nothing but the plan is wanted.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: Its context is too short for prompt and completion.
    """
    disable_progress_bar()  # "Loading weights" would stand in front of our own bar and of errors
    torch.manual_seed(recipe.seed)
    options: dict[str, Any] = (
        {"experts_implementation": recipe.experts_implementation} if recipe.experts_implementation else {}
    )
    policy = load_or_outline(recipe.model, is_dry=is_dry, **options)
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)  # Bloom, for one, has no end
    if context is not None and recipe.max_prompt_tokens + recipe.response_length > context:
        raise ValueError(
            f"max_prompt_tokens={recipe.max_prompt_tokens} and response_length={recipe.response_length}: together "
            f"longer than the model's context of {context} tokens"
        )
    if recipe.lora_rank:
        return policy, None
    if is_dry and policy.device.type == "meta":
        return policy, policy
    options.update(auto_class=AutoModelForSequenceClassification, num_labels=1)
    if recipe.value_model is None:
        value_model = load_model(recipe.model, **options)
        torch.nn.init.zeros_(value_model.score.weight)  # a random head would start with a random baseline
        return policy, value_model
    try:
        return policy, load_model(recipe.value_model, **options)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"value_model: {str(error).removeprefix('model: ')}") from error


def ppo_config(recipe: AlignRecipe, output: Path) -> PPOConfig:
    """Return TRL's settings for a recipe.

    Args:
        recipe: The settings.
        output: The run folder; checkpoints go into it.
    """
    refuse_fsdp("align")
    refuse_split_adapter(recipe.lora_rank, "align")
    accelerator_config = prepare_engine()
    num_processes = PartialState().num_processes
    return PPOConfig(
        accelerator_config=accelerator_config,
        output_dir=str(output / "checkpoints"),
        seed=recipe.seed,
        per_device_train_batch_size=recipe.batch_size // recipe.num_mini_batches,
        gradient_accumulation_steps=recipe.num_mini_batches,
        num_mini_batches=recipe.num_mini_batches,
        per_device_eval_batch_size=recipe.batch_size,
        local_rollout_forward_batch_size=recipe.batch_size,
        num_ppo_epochs=recipe.num_ppo_epochs,
        response_length=recipe.response_length,
        temperature=recipe.temperature,
        learning_rate=recipe.learning_rate,
        lam=recipe.lam,
        kl_coef=recipe.kl_coef,
        cliprange=recipe.cliprange,
        cliprange_value=recipe.cliprange_value,
        vf_coef=recipe.vf_coef,
        max_grad_norm=recipe.max_grad_norm,
        missing_eos_penalty=recipe.missing_eos_penalty,
        stop_token="eos",
        bf16=False,
        **checkpointing_setting(False),
        logging_steps=1,
        save_strategy="steps",
        save_steps=10,
        save_total_limit=1,
        num_sample_generations=0,
        use_cpu=not torch.accelerator.is_available(),  # or several processes on a CPU would not find each other
        disable_tqdm=True,  # our own bar shows the reward
        report_to=choose_trackers(recipe) or "none",
        project="deepseek-moe",
        run_name=f"{output.parent.name}-{output.name}",
        world_size=num_processes,  # TRL hides TrainingArguments' own; `open_run` needs it
        total_episodes=recipe.num_updates * recipe.batch_size * num_processes,
    )


def build_trainer(
    recipe: AlignRecipe, args: PPOConfig, run: RunFolder, *callbacks: TrainerCallback, **parts: Any
) -> CorrectedPPOTrainer:
    """Return the PPO trainer; the reference is a frozen copy of the policy, with LoRA the policy without adapter.

    Args:
        recipe: The settings.
        args: TRL's settings.
        run: The run folder, for the log.
        callbacks: Further ones.
        parts: Models, data and reward, under `CorrectedPPOTrainer`'s names.
    """
    tokenizer = parts["processing_class"]
    if tokenizer.pad_token_id is None:  # GPT-2's and Llama's; PPO tells padding from text by an id of its own
        tokenizer.pad_token = tokenizer.eos_token
    lora = {"r": recipe.lora_rank, "lora_alpha": 2 * recipe.lora_rank, "target_modules": "all-linear"}
    trainer = CorrectedPPOTrainer(
        args=args,
        callbacks=[KlControl(recipe.target_kl, recipe.stop_kl), MetricsFile(run), *callbacks],
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if recipe.lora_rank else None,
        num_eval_samples=recipe.num_eval_samples,
        **parts,
    )
    check_engine(trainer.accelerator)
    trainer.remove_callback(PrinterCallback)  # it prints every metric of every update
    if recipe.router_replay:
        RouterReplayCallback.attach(trainer)
    return trainer
