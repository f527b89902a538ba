"""What the align stage measures before and after, and what it leaves: results, gain, samples, models.

The gain is judged pairwise, prompt by prompt with the same random numbers: prompts differ far more among themselves
than a prompt's rewards before and after. The unpaired error is reported beside it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from deepseek_records.run_folder import METRICS_FILE, RunFolder
from deepseek_records.statistics import difference_with_error, mean_with_error
from deepseek_records.summary import Check, Gain, Result, Sample, When
from deepseek_training.data.prompts import prompt_texts
from deepseek_training.ppo.evaluation import numbers_of
from deepseek_training.ppo.trainer import CorrectedPPOTrainer
from deepseek_training.ppo.value import without_adapter
from deepseek_training.trainer.lora import ADAPTER_FOLDER, merged
from deepseek_training.trainer.rewarded_policy import measure_before

METRIC_NAMES = ("reward", "reward_relevance", "reward_safety", "reward_diversity", "kl", "length_tokens")
NUM_SAMPLES = 6


def evaluate_once(trainer: CorrectedPPOTrainer, run: RunFolder) -> dict[str, list[Any]]:
    """Return the start model's evaluation; a resumed run reads it instead of logging it again.

    Args:
        trainer: Before its training.
        run: The run folder, where a file keeps it.
    """

    def measure() -> dict[str, list[Any]]:
        if trainer.accelerator.is_main_process:
            (run.path / METRICS_FILE).unlink(missing_ok=True)  # left by an evaluation that was interrupted
        trainer.evaluate(metric_key_prefix="before")
        return trainer.last_evaluation

    before = measure_before(run, measure)
    trainer.accelerator.wait_for_everyone()
    return before


def measure_gain(before: Sequence[float], after: Sequence[float]) -> Gain:
    """Return what the rewards of the same prompts have risen by.

    Args:
        before: One reward per prompt.
        after: The same prompts', in the same order.
    """
    gains = [new - old for old, new in zip(before, after, strict=True)]
    value, paired = mean_with_error(gains)
    unpaired = difference_with_error(mean_with_error(after), mean_with_error(before))[1]
    return Gain(value=value, stderr_paired=paired, stderr_unpaired=unpaired, n=len(gains))


def gain_check(gain: Gain, bound: float) -> Check:
    """Return the summary's line on the target.

    Args:
        gain: What was measured.
        bound: Least gain in paired standard errors.
    """
    ratio = gain.value / gain.stderr_paired if gain.stderr_paired else 0.0
    return Check.compare("held-out reward gain, in paired standard errors", ratio, ">=", bound)


def reward_rows(dataset: str, when: When, columns: dict[str, list[Any]]) -> tuple[Result, ...]:
    """Return the summary's lines on one evaluation.

    Args:
        dataset: The prompts, as the recipe names them.
        when: ``before`` or ``after``.
        columns: One list per metric, one value per prompt.
    """
    rows = []
    for name in METRIC_NAMES:
        numbers = numbers_of(columns.get(name, []))
        if numbers:
            value, error = mean_with_error(numbers)
            about: dict[str, Any] = {"dataset": dataset, "split": "validation", "when": when}
            rows.append(Result(metric=name, value=value, stderr=error, n=len(numbers), **about))
    return tuple(rows)


def pair_samples(
    prompts: Sequence[str], before: dict[str, list[Any]], after: dict[str, list[Any]]
) -> tuple[Sample, ...]:
    """Return a few prompts with what the model made of them before and after.

    Args:
        prompts: The held-out prompts.
        before: The evaluation of the start model, a list per column.
        after: That of the aligned one.
    """
    columns: tuple[tuple[When, dict[str, list[Any]]], ...] = (("before", before), ("after", after))
    return tuple(
        Sample(prompt=prompts[i], completion=column["completion"][i], when=when)
        for i in _picks(len(prompts))
        for when, column in columns
    )


def _picks(num_prompts: int) -> range:
    return range(0, num_prompts, max(1, num_prompts // NUM_SAMPLES))[:NUM_SAMPLES]


def sampler(trainer: CorrectedPPOTrainer, held_out: Dataset) -> Callable[[], tuple[Sample, ...]]:
    """Return what completes, whenever it is called, the prompts that `pair_samples` shows.

    Args:
        trainer: Whose policy writes.
        held_out: The held-out prompts.
    """
    rows = held_out.select(_picks(len(held_out)))
    prompts = prompt_texts(rows)

    def write() -> tuple[Sample, ...]:
        completions = trainer.complete(rows)["completion"]
        return tuple(Sample(prompt=one, completion=text) for one, text in zip(prompts, completions, strict=True))

    return write


def save_models(trainer: CorrectedPPOTrainer, run: RunFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the policy to ``model/``, beside it ``value_model/`` and ``reference/``, each loadable by itself.

    Every process has to come here; the first one writes. With LoRA the adapters are merged into the weights there; the
    policy's also lies in ``adapter/``.

    Args:
        trainer: After training.
        run: The run folder.
        tokenizer: Saved beside each model.
    """
    with trainer.player.whole_weights():
        if trainer.accelerator.is_main_process:
            _save_each(trainer, run, tokenizer)


def _save_each(trainer: CorrectedPPOTrainer, run: RunFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    policy, value_model = unwrapped.policy, unwrapped.value_model
    if trainer.ref_model is None:
        policy.save_pretrained(run.path / ADAPTER_FOLDER)
    builders = {
        "reference": lambda: without_adapter(policy) if trainer.ref_model is None else trainer.ref_model,
        "value_model": lambda: merged(value_model),
        "model": lambda: merged(policy),
    }
    for name, build in builders.items():  # one at a time, for each may be a copy
        build().save_pretrained(run.path / name)
        tokenizer.save_pretrained(run.path / name)
