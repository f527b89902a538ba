"""What a card says of limits, and what it lists as not measured: each line follows from a result or its absence."""

from deepseek_model_cards.benchmarks import compare_to_chance
from deepseek_model_cards.card.metadata import Measured
from deepseek_model_cards.stage_rows import stage_title
from deepseek_model_cards.wording import format_value, label_dataset
from deepseek_records.lineage import Lineage
from deepseek_records.stages import Stage

# Above this, max / mean tokens of the experts of a layer, a card warns; `deepseek_training.balance` warns at the same.
IMBALANCE_BOUND = 4.0
# The stages that learn from a reward.
REWARDED = ("align", "grpo")
# What a full card would hold, and what a result that measures it says that it `measures`.
MEASUREMENTS = (
    ("knowledge (MMLU and the like)", "knowledge"),
    ("code (HumanEval and the like)", "code"),
    ("language modeling on held-out text (bits per byte, perplexity)", "language"),
    ("social bias (CrowS-Pairs, WinoBias, BBQ and the like)", "bias"),
    ("refusals of harmful and of harmless requests (AdvBench, XSTest)", "refusal"),
    ("harmful completions judged by an independent classifier", "harm"),
    ("robustness to typing errors, option order, distraction and wording", "robustness"),
    ("accuracy from common to rare terms (long tail)", "long tail"),
    ("robustness to adversarial prompts", "adversarial prompts"),
    ("calibration of its probabilities", "calibration"),
    ("reasoning and mathematics (GSM8K and the like)", "reasoning"),
    ("long contexts", "long contexts"),
    ("languages other than the training data's", "languages"),
    ("overlap of the training data with the benchmarks", "contamination"),
    ("truth of what it says (TruthfulQA and the like)", "truth"),
)
# The training stages' own figures, which no task describes.
_STAGE_MEASURES = {"bits_per_byte": "language", "perplexity": "language", "loss": "language", "reward": "reward"}


def limit_lines(lineage: Lineage, finals: list[Measured]) -> list[str]:
    """Return the lines under "Limits".

    Args:
        lineage: The model's stages.
        finals: The results of the final model.
    """
    lines = []
    for row in (found.result for found in finals):
        reading = compare_to_chance(row)
        if reading.startswith(("at chance", "below chance", "none solved")):
            lines.append(f"{label_dataset(row)}: {format_value(row.value, row.stderr)}, {reading}.")
    for stage in lineage.stages.values():
        lines += _imbalance_lines(stage)
        lines += [f"{stage_title(stage)}: the target '{name}' was missed." for name in _missed(stage)]
    rewarded = [stage for stage in lineage.stages.values() if stage.kind in REWARDED and stage.is_finished]
    lines += [reward_line(stage) for stage in rewarded]
    if not any(found.result.measures == "truth" for found in finals):
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
    model = stage.settings.get("reward_model")
    named = f" (the reward model `{model}`)" if isinstance(model, str) else ""
    if not named and isinstance(weights, list) and len(weights) == len(parts):
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
    asked = (*MEASUREMENTS, *((("reward on held-out prompts", "reward"),) if kinds & set(REWARDED) else ()))
    rows = [row for stage in lineage.stages.values() for row in stage.results]
    measured = {row.measures or _STAGE_MEASURES.get(row.metric) for row in rows}
    return [text for text, kind in asked if kind not in measured]
