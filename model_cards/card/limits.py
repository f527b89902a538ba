"""What a card says of limits, and what it lists as not measured: each line follows from a result or its absence."""

import re

from deepseek_model_cards.benchmarks import chance_level, compare_to_chance
from deepseek_model_cards.card.metadata import Measured
from deepseek_model_cards.stage_rows import stage_title
from deepseek_model_cards.wording import format_value, label_dataset
from deepseek_records.lineage import Lineage
from deepseek_records.stages import Stage

# Above this, max / mean tokens of the experts of a layer, a card warns; `deepseek_training.balance` warns at the same.
IMBALANCE_BOUND = 4.0
# What a full card would hold, and how a result that measures it reads as "metric data set".
MEASUREMENTS = (
    ("knowledge: MMLU", r"mmlu"),
    ("code: HumanEval", r"humaneval"),
    ("language modeling on held-out text (bits per byte, perplexity)", r"bits_per_byte|perplexity|loss"),
    ("social bias (CrowS-Pairs, WinoBias, BBQ and the like)", r"crows|winobias|bbq|stereoset|\bbias"),
    ("refusals of harmful and of harmless requests (AdvBench, XSTest)", r"refusal"),
    ("harmful completions judged by an independent classifier", r"harmful_completions|toxicity"),
    ("robustness to typing errors, option order, distraction and wording", r"perturbed"),
    ("accuracy from common to rare terms (long tail)", r"term frequency"),
    ("robustness to adversarial prompts", r"adversarial|jailbreak|attack"),
    ("calibration of its probabilities", r"calibration|\bece\b"),
    ("reasoning and mathematics (GSM8K and the like)", r"gsm8k|math"),
    ("long contexts", r"long_context|needle|ruler"),
    ("languages other than the training data's", r"multilingual|flores"),
    ("overlap of the training data with the benchmarks", r"contamination|overlap"),
    ("truth of what it says (TruthfulQA and the like)", r"truthful"),
)


def limit_lines(lineage: Lineage, finals: list[Measured]) -> list[str]:
    """Return the lines under "Limits".

    Args:
        lineage: The model's stages.
        finals: The results of the final model.
    """
    lines = []
    for row in (found.result for found in finals):
        reading = compare_to_chance(row, chance_level(row))
        if reading.startswith(("at chance", "below chance", "none solved")):
            lines.append(f"{label_dataset(row)}: {format_value(row.value, row.stderr)}, {reading}.")
    for stage in lineage.stages.values():
        lines += _imbalance_lines(stage)
        lines += [f"{stage_title(stage)}: the target '{name}' was missed." for name in _missed(stage)]
    lines += [reward_line(stage) for stage in lineage.stages.values() if stage.kind == "align" and stage.is_finished]
    if not any("truthful" in f"{found.result.metric} {found.result.dataset}".lower() for found in finals):
        lines.append(
            "Whether what it says is true was not measured. Nothing here speaks for using it where a wrong sentence "
            "does harm: medical, legal or financial advice, or decisions about people."
        )
    return lines


def _missed(stage: Stage) -> tuple[str, ...]:
    return stage.summary.missed if stage.summary else ()


def _imbalance_lines(stage: Stage) -> list[str]:
    """A line where a layer's busiest expert got more than the bound times the mean, in the last window logged."""
    loads = stage.summary.tokens_per_expert if stage.summary else ()
    worst = max((max(layer) * len(layer) / sum(layer) for layer in loads if sum(layer) > 0), default=0.0)
    if worst <= IMBALANCE_BOUND:
        return []
    idle = sum(count == 0 for layer in loads for count in layer)
    unused = f", and {idle} of {sum(map(len, loads))} experts got no token" if idle else ""
    return [
        f"{stage_title(stage)}: the experts' load ended uneven. The busiest expert of a layer got {worst:.1f} times "
        f"the mean (a warning is given above {IMBALANCE_BOUND:g}){unused}."
    ]


def reward_line(stage: Stage) -> str:
    """Return what the reward of an alignment was, from its settings.

    Args:
        stage: The alignment.
    """
    weights = stage.settings.get("weights")
    parts = ("relevance", "safety", "diversity")
    named = ""
    if isinstance(weights, list) and len(weights) == len(parts):
        named = f" ({', '.join(f'{part} {weight:g}' for part, weight in zip(parts, weights, strict=True))})"
    return (
        f"The reward of its alignment{named} is an automatic measure. A higher reward is not proof of a better or a "
        "safer answer."
    )


def not_measured(lineage: Lineage) -> list[str]:
    """Return what a full card would hold and no stage measured.

    Args:
        lineage: The model's stages.
    """
    kinds = {stage.kind for stage in lineage.stages.values()}
    asked = (*MEASUREMENTS, *((("reward on held-out prompts", r"reward"),) if "align" in kinds else ()))
    rows = [row for stage in lineage.stages.values() for row in stage.results]
    measured = " ".join(f"{row.metric} {row.dataset}" for row in rows)
    return [text for text, pattern in asked if not re.search(pattern, measured, re.IGNORECASE)]
