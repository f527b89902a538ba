"""Stage 3: align a model with PPO under a weighted reward.

``deepseek-moe align RECIPE`` and the demo call `align`. The run folder keeps policy (``model/``), value model and
reference, a row of metrics an update, and the held-out prompts' rewards before and after. Surprising: the gain is
judged pairwise, prompt by prompt with the same random numbers, because the prompts differ far more among themselves
than a prompt's rewards before and after; the unpaired error is reported beside it.
"""

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from deepseek_records.loading import load_model, load_tokenizer
from deepseek_records.run_folder import RunFolder, write_json
from deepseek_records.summary import Check, Gain, Result, Sample, Summary
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.loading import recipe_settings

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # pinned below 1.13, so its warning tells a user nothing
METRIC_NAMES = ("reward", "reward_relevance", "reward_safety", "reward_diversity", "kl", "length_tokens")
NUM_SAMPLES = 6


def align(recipe: AlignRecipe, output: str | Path, *, overwrite: bool = False) -> Summary:
    """Align a model and return the summary, also written to the run folder.

    Args:
        recipe: The settings.
        output: The run folder; an unfinished run with equal settings goes on from its last checkpoint.
        overwrite: Delete whatever run the folder holds.

    Raises:
        ValueError: A setting or a prompt that cannot work.
        FileNotFoundError: No such model or prompts.
        FileExistsError: The folder holds something else.
        RewardError: The reward failed in mid-run; the run can be taken up again.
    """
    from deepseek_training.ppo.checkpoint import last_checkpoint
    from deepseek_training.ppo.run_callbacks import RewardBar

    started = time.time()
    reward = build_reward(recipe)
    tokenizer = load_tokenizer(recipe.model)
    prompts = {
        "train": load_prompts(recipe, tokenizer, "train"),
        "validation": load_prompts(recipe, tokenizer, "validation").select_columns(["prompt", "input_ids"]),
    }
    held_out = prompts["validation"].select(range(min(recipe.num_eval_prompts, len(prompts["validation"]))))
    args = ppo_config(recipe, Path(output))
    if len(prompts["train"]) < recipe.batch_size * args.world_size:
        raise ValueError(
            f"batch_size={recipe.batch_size}: {recipe.prompts} has only {len(prompts['train'])} prompts to train on, "
            f"for {args.world_size} process(es)"
        )
    policy, value_model = load_models(recipe)  # a bad path leaves no run folder behind
    run = open_run(recipe, args, output, overwrite=overwrite)
    bar = RewardBar("align")
    trainer = build_trainer(
        recipe,
        args,
        run,
        bar,
        processing_class=tokenizer,
        model=policy,
        value_model=value_model,
        reward=reward,
        train_dataset=prompts["train"],
        eval_dataset=held_out,
    )
    before = evaluate_once(trainer, run.path / "before.json")
    with contextlib.closing(bar):
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    trainer.evaluate(metric_key_prefix="after")
    summary = summarize(recipe, prompts, held_out, before, trainer.last_evaluation, time.time() - started)
    if trainer.accelerator.is_main_process:
        save_models(trainer, run, tokenizer)
        run.finish(summary)
    trainer.accelerator.wait_for_everyone()
    return summary


def open_run(recipe: AlignRecipe, args: Any, output: str | Path, *, overwrite: bool = False) -> RunFolder:
    """Return the run folder; of several processes the first makes it.

    Args:
        recipe: The settings.
        args: TRL's settings, which know the processes.
        output: The folder.
        overwrite: Delete whatever run the folder holds.

    Raises:
        FileExistsError: The folder holds another run.
    """
    from deepseek_training.trainer.checkpoints import last_complete_checkpoint, step_of
    from deepseek_training.trainer.run_callbacks import drop_metrics_after

    settings = recipe_settings(recipe)
    with args.main_process_first(local=False):
        if args.process_index > 0:
            return RunFolder.join(output, settings)
        run = RunFolder.create(output, settings, command="align", seed=recipe.seed, overwrite=overwrite)
        checkpoint = last_complete_checkpoint(Path(args.output_dir))
        begun = 0 if (run.path / "before.json").exists() else -1
        drop_metrics_after(run, step_of(checkpoint) if checkpoint else begun)
    return run


def evaluate_once(trainer: Any, path: Path) -> dict[str, list[Any]]:
    """Return the start model's evaluation; a resumed run reads it instead of logging it again.

    Args:
        trainer: Before its training.
        path: The file that keeps it.
    """
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    trainer.evaluate(metric_key_prefix="before")
    if trainer.accelerator.is_main_process:
        write_json(path, trainer.last_evaluation)
    trainer.accelerator.wait_for_everyone()
    return trainer.last_evaluation


def build_reward(recipe: AlignRecipe) -> Any:
    """Return the weighted reward of a recipe."""
    from trl.rewards import get_repetition_penalty_reward

    from deepseek_training.rewards import Diversity, Relevance, Safety, WeightedReward

    penalties = [get_repetition_penalty_reward(3, -recipe.repetition_penalty)] if recipe.repetition_penalty else []
    return WeightedReward(
        [Relevance(), Safety(), Diversity()],
        weights=recipe.weights,
        gate=None if recipe.gate_threshold is None else "safety",
        gate_threshold=1.0 if recipe.gate_threshold is None else recipe.gate_threshold,
        penalties=penalties,
        is_standardized=recipe.is_standardized,
    )


def load_prompts(recipe: AlignRecipe, tokenizer: Any, split: str) -> Any:
    """Return a `datasets.Dataset` with ``prompt`` and ``input_ids``, in order of appearance.

    Raises:
        ValueError: No prompts, or one longer than `max_prompt_tokens`.
    """
    import datasets

    from deepseek_training.data.texts import load_texts, read_rows

    texts = load_texts(recipe.prompts, split, column=recipe.prompt_column)
    if recipe.prompt_sources:
        rows = read_rows(recipe.prompts, column=recipe.prompt_column)
        wanted = {row["text"] for row in rows if row.get("source") in recipe.prompt_sources}
        texts = [text for text in texts if text in wanted]
    if not texts:
        raise ValueError(f"prompt_sources={recipe.prompt_sources}: {recipe.prompts} has no {split} row from them")
    ids = [encode_prompt(text, tokenizer, recipe.prompt_template) for text in texts]
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > recipe.max_prompt_tokens:
        raise ValueError(
            f"prompts: {recipe.prompts} holds a prompt of {len(ids[longest])} tokens ({texts[longest][:40]!r}...), "
            f"longer than max_prompt_tokens={recipe.max_prompt_tokens}"
        )
    return datasets.Dataset.from_dict({"prompt": texts, "input_ids": ids})


def encode_prompt(prompt: str, tokenizer: Any, template: str | None) -> list[int]:
    """Return a prompt's token ids, put as the template says; None takes the tokenizer's chat template.

    Raises:
        ValueError: No template is given and the tokenizer has none.
    """
    if template is not None:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return start + tokenizer(template.replace("{prompt}", prompt), add_special_tokens=False)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError("prompt_template=null: the tokenizer has no chat template; give one such as '{prompt}\\n'")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def load_models(recipe: AlignRecipe) -> tuple[Any, Any]:
    """Return the policy and the value model, None where LoRA lets it share the policy's weights.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: Its context is too short for prompt and completion.
    """
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # "Loading weights" would stand in front of our own bar and of errors
    torch.manual_seed(recipe.seed)
    options = {"experts_implementation": recipe.experts_implementation} if recipe.experts_implementation else {}
    policy = load_model(recipe.model, **options)
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)  # Bloom, for one, has no end
    if context is not None and recipe.max_prompt_tokens + recipe.response_length > context:
        raise ValueError(
            f"max_prompt_tokens={recipe.max_prompt_tokens} and response_length={recipe.response_length}: together "
            f"longer than the model's context of {context} tokens"
        )
    if recipe.lora_rank:
        return policy, None
    options.update(auto_class=AutoModelForSequenceClassification, num_labels=1)
    if recipe.value_model is None:
        value_model = load_model(recipe.model, **options)
        torch.nn.init.zeros_(value_model.score.weight)  # a random head would start with a random baseline
        return policy, value_model
    try:
        return policy, load_model(recipe.value_model, **options)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"value_model: {str(error).removeprefix('model: ')}") from error


def ppo_config(recipe: AlignRecipe, output: Path) -> Any:
    """Return TRL's settings."""
    import torch
    from accelerate import PartialState
    from trl.experimental.ppo import PPOConfig

    args = PPOConfig(
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
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="steps",
        save_steps=10,
        save_total_limit=1,
        num_sample_generations=0,
        use_cpu=not torch.accelerator.is_available(),  # or several processes on a CPU would not find each other
        disable_tqdm=True,  # our own bar shows the reward
        report_to=[],
    )
    args.world_size = PartialState().num_processes  # TRL hides TrainingArguments' own; `open_run` needs it
    args.total_episodes = recipe.num_updates * recipe.batch_size * args.world_size
    return args


def build_trainer(recipe: AlignRecipe, args: Any, run: RunFolder, *callbacks: Any, **parts: Any) -> Any:
    """Return the PPO trainer; the reference is a frozen copy of the policy, with LoRA the policy without adapter.

    Args:
        recipe: The settings.
        args: TRL's settings.
        run: The run folder, for the log.
        callbacks: Further ones.
        parts: Models, data and reward, under `CorrectedPPOTrainer`'s names.
    """
    from peft import LoraConfig
    from transformers import PrinterCallback

    from deepseek_training.ppo.run_callbacks import LogToRunFolder
    from deepseek_training.ppo.trainer import CorrectedPPOTrainer

    lora = {"r": recipe.lora_rank, "lora_alpha": 2 * recipe.lora_rank, "target_modules": "all-linear"}
    trainer = CorrectedPPOTrainer(
        args=args,
        callbacks=[LogToRunFolder(run), *callbacks],
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if recipe.lora_rank else None,
        **parts,
    )
    trainer.num_eval_samples = recipe.num_eval_samples
    trainer.remove_callback(PrinterCallback)  # it prints every metric of every update
    return trainer


def save_models(trainer: Any, run: RunFolder, tokenizer: Any) -> None:
    """Write the policy to ``model/``, beside it ``value_model/`` and ``reference/``, each loadable by itself.

    With LoRA the adapters are merged into the weights there; the policy's also lies in ``adapter/``.
    """
    from deepseek_training.ppo.value import merged, without_adapter

    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    policy, value_model = unwrapped.policy, unwrapped.value_model
    if trainer.ref_model is None:
        policy.save_pretrained(run.path / "adapter")
    builders = {
        "reference": lambda: without_adapter(policy) if trainer.ref_model is None else trainer.ref_model,
        "value_model": lambda: merged(value_model),
        "model": lambda: merged(policy),
    }
    for name, build in builders.items():  # one at a time, for each may be a copy
        build().save_pretrained(run.path / name)
        tokenizer.save_pretrained(run.path / name)


def summarize(
    recipe: AlignRecipe,
    prompts: dict[str, Any],
    held_out: Any,
    before: dict[str, Any],
    after: dict[str, Any],
    seconds: float,
) -> Summary:
    """Return the summary: results before and after, the gain with its error, data, checks and samples."""
    from deepseek_training.data.texts import describe_data
    from deepseek_training.ppo.evaluation import standard_error

    results = tuple(
        Result(
            metric=name,
            dataset=recipe.prompts,
            split="validation",
            when=when,
            value=sum(values[name]) / len(values[name]),
            stderr=standard_error(values[name]),
            n=len(values[name]),
        )
        for when, values in (("before", before), ("after", after))
        for name in METRIC_NAMES
        if name in values
    )
    gains = [new - old for old, new in zip(before["reward"], after["reward"], strict=True)]
    gain, paired = sum(gains) / len(gains), standard_error(gains)
    unpaired = math.hypot(standard_error(before["reward"]), standard_error(after["reward"]))
    ratio = gain / paired if paired else 0.0
    picks = range(0, len(held_out), max(1, len(held_out) // NUM_SAMPLES))[:NUM_SAMPLES]
    what = "held-out reward gain, in paired standard errors"
    return Summary(
        stage="align",
        results=results,
        gain=Gain(value=gain, stderr_paired=paired, stderr_unpaired=unpaired, n=len(gains)),
        data=(
            describe_data(recipe.prompts, "train", prompts["train"]["prompt"], "training"),
            describe_data(recipe.prompts, "validation", held_out["prompt"], "evaluation"),
        ),
        checks=(Check.compare(what, ratio, ">=", recipe.min_gain_stderr),),
        samples=tuple(
            Sample(prompt=held_out[i]["prompt"], completion=values["completion"][i], when=when)
            for i in picks
            for when, values in (("before", before), ("after", after))
        ),
        seconds=seconds,
    )
