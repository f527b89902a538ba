"""What the gate is asked about an update: its sets, the measurement of old model and candidates, and the decision."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from deepseek_records.loading import load_model
from deepseek_training.continual.gate import (
    Finding,
    as_rows,
    choose_candidate,
    compare_bits,
    judge_gain,
    judge_loss,
    judge_order,
    judge_safety,
    judge_text,
)
from deepseek_training.continual.held_out_units import Half, HeldOutUnits
from deepseek_training.continual.written_safety import choose_prompts, score_completions, score_text
from deepseek_training.data.corpus import Corpus, check_corpora, distinct_names
from deepseek_training.recipes.update import UpdateRecipe

# Of the old model, the candidate, and the sets; returns rows for gates.json.
MeasureDrift = Callable[[PreTrainedModel, PreTrainedModel, Sequence[HeldOutUnits]], list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class GateSets:
    """The held-out sets of an update.

    Attributes:
        new: Of the new text.
        earlier: Of every text before.
    """

    new: HeldOutUnits
    earlier: Sequence[HeldOutUnits]

    @classmethod
    def prepare(
        cls,
        new: Corpus,
        earlier: Sequence[Corpus],
        tokenizer: PreTrainedTokenizerBase,
        recipe: UpdateRecipe,
    ) -> "GateSets":
        """Return the sets of some sources.

        Args:
            new: The new text.
            earlier: Every text before.
            tokenizer: The model's.
            recipe: The settings.

        Raises:
            ValueError: Nothing is held out, too little is, or a text is trained on and held out.
        """
        if not len(new.validation):
            raise ValueError(
                f"data: got no held-out text of {new.name}, expected some; without it no gain can be shown"
            )
        if not any(len(corpus.validation) for corpus in earlier):
            raise ValueError(
                "general_data: got no held-out text of what the model learned before, expected some; without it the "
                "gate has nothing to compare with"
            )
        check_corpora([new, *earlier])
        names = distinct_names([new, *earlier])
        first, *others = (
            HeldOutUnits.prepare(name, corpus.validation, tokenizer, recipe.eval_bytes)
            for name, corpus in zip(names, [new, *earlier], strict=True)
            if len(corpus.validation)
        )
        return cls(first, others)

    @property
    def all(self) -> list[HeldOutUnits]:
        """The new set and the others."""
        return [self.new, *self.earlier]


@dataclasses.dataclass
class Gate:
    """Measures an update's models and decides.

    Args:
        recipe: The bounds.
        sets: What is measured on.
        tokenizer: The models'.
        args: The trainer's arguments, which know the device.
    """

    recipe: UpdateRecipe
    sets: GateSets
    tokenizer: PreTrainedTokenizerBase
    args: TrainingArguments

    def load(self, folder: Path) -> PreTrainedModel:
        """Return a model where it can be measured."""
        model = load_model(folder)
        model.set_experts_implementation(self.recipe.experts_implementation)
        moved: PreTrainedModel = model.to(self.args.device)
        return moved

    def measure(self, model: PreTrainedModel, half: Half) -> dict[str, np.ndarray]:
        """Return each set's bits by unit of one half."""
        return {one.name: self._measure(one, model, half) for one in self.sets.all}

    def _measure(self, units: HeldOutUnits, model: PreTrainedModel, half: Half) -> np.ndarray:
        sizes = {"sequence_length": self.recipe.sequence_length, "batch_size": self.recipe.batch_size}
        return units.measure(model, half=half, **sizes)

    def decide(
        self, base: Path, candidates: Mapping[float, Path], measure_drift: MeasureDrift | None = None
    ) -> dict[str, Any]:
        """Return what ``gates.json`` holds: whether an update is kept, at which alpha, and every figure behind it.

        Args:
            base: The old model.
            candidates: Folders by alpha.
            measure_drift: How far the routers have moved.
        """
        old = self.load(base)
        before = self.measure(old, "choose")
        changes = {
            alpha: self._changes(before, self.measure(self.load(folder), "choose"))
            for alpha, folder in candidates.items()
        }
        picked = {alpha: {name: change for name, (change, _) in row.items()} for alpha, row in changes.items()}
        alpha = choose_candidate(picked, self.sets.new.name, self.recipe)
        chosen = self.load(candidates[alpha])
        after = self.measure(chosen, "decide")
        findings = [*self._judge_bits(self.measure(old, "decide"), after), *self._judge_writing(old, chosen, after)]
        rows = [
            {"alpha": one, "changes": {name: _pair(pair) for name, pair in row.items()}}
            for one, row in changes.items()
        ]
        return {
            "accepted": all(finding.passed for finding in findings),
            "alpha": alpha,
            "why": [finding.why for finding in findings if not finding.passed],
            "findings": as_rows(findings),
            "candidates": rows,
            "sets": [
                {
                    "name": one.name,
                    "unit": one.unit,
                    "num_choosing": int(one.half("choose").sum()),
                    "num_deciding": int(one.half("decide").sum()),
                }
                for one in self.sets.all
            ],
            "drift": [] if measure_drift is None else measure_drift(old, chosen, self.sets.all),
        }

    def _changes(
        self, before: dict[str, np.ndarray], after: dict[str, np.ndarray]
    ) -> dict[str, tuple[float, float | None]]:
        """By set, relative change and error on the half that chooses."""
        num_bytes = {one.name: one.num_bytes[one.half("choose")] for one in self.sets.all}
        return {name: compare_bits(before[name], after[name], size)[:2] for name, size in num_bytes.items()}

    def _judge_bits(self, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> list[Finding]:
        found = []
        for one in self.sets.all:
            bits = before[one.name], after[one.name], one.num_bytes[one.half("decide")]
            judge = judge_gain if one is self.sets.new else judge_loss
            found.append(judge(one.name, one.unit, bits, self.recipe))
        return found

    def _judge_writing(
        self, old: PreTrainedModel, chosen: PreTrainedModel, after: dict[str, np.ndarray]
    ) -> list[Finding]:
        """Whether the new text is a text, and what the models write."""
        recipe, new, found = self.recipe, self.sets.new, []
        if not all(np.isfinite(bits).all() for bits in after.values()):
            return []  # the losses have said so; such a model writes nothing
        if recipe.min_order_errors is not None:
            bits = self._measure(new.shuffled(self.tokenizer, recipe.seed), chosen, "decide")
            found.append(judge_order(new.name, new.unit, after[new.name], bits, recipe))
        if recipe.max_unsafe_share is not None and (safety := score_text(new.texts)):
            found.append(judge_text(new.name, safety, recipe))
        if recipe.max_safety_loss is not None:
            prompts = choose_prompts([one.documents for one in self.sets.all], recipe.safety_prompts)
            scores = [score_completions(one, self.tokenizer, prompts, seed=recipe.seed) for one in (old, chosen)]
            pairs = [(a, b) for a, b in zip(*scores, strict=True) if a is not None and b is not None]
            if pairs:
                found.append(judge_safety([a for a, _ in pairs], [b for _, b in pairs], recipe))
        return found


def _pair(pair: tuple[float, float | None]) -> dict[str, float]:
    named = {"value": pair[0], "stderr": pair[1]}
    return {key: value for key, value in named.items() if value is not None and np.isfinite(value)}
