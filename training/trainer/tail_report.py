"""The long tail of the domain before and after an adaptation: figures for the summary, and ``plots/long_tail.png``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from deepseek_records.run_folder import RunFolder
from deepseek_training.data.corpus import Corpus
from deepseek_training.knowledge.frequency_loss import TailCounts, TailText, measure_tail
from deepseek_training.knowledge.tail_figures import changes, describe_tail
from deepseek_training.knowledge.tail_picture import draw_tail
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe
from deepseek_training.trainer.held_out import HeldOut, scored_texts
from deepseek_training.trainer.run_callbacks import finite_or_none


@dataclasses.dataclass
class TailReport:
    """What the first process measures.

    Attributes:
        trainer: The stage's; its model is measured.
        tokenizer: The model's.
        text: The held-out text of the domain.
        sequence_length: Tokens that the model sees at once.
        before: Counts before the training.
    """

    trainer: Any
    tokenizer: Any
    text: TailText
    sequence_length: int
    before: dict[str, TailCounts] = dataclasses.field(default_factory=dict)

    @classmethod
    def begin(
        cls, recipe: AdaptRecipe, trainer: Any, tokenizer: Any, domain: Sequence[Corpus], held_out: Sequence[HeldOut]
    ) -> "TailReport | None":
        """Measure before the training; None where the recipe wants no report, or in a process that writes nothing.

        Args:
            recipe: The settings.
            trainer: Before it trains.
            tokenizer: The model's.
            domain: The sources of the domain.
            held_out: The sets that are scored, those of the domain first.

        Raises:
            ValueError: The model is sharded, or nothing of the held-out text falls into a band.
        """
        if not recipe.long_tail:
            return None
        if trainer.is_sharded:
            raise ValueError("long_tail: got true with a model sharded over processes, expected false")
        if not trainer.is_first:
            return None
        texts = [text for one in scored_texts(domain, held_out) for text in one]
        train = [text for corpus in domain for text in corpus.train]
        text = TailText.prepare(train, texts)
        if not text.spans:
            raise ValueError(
                "long_tail: got true, expected false; the held-out text has no topic, and no word of four letters "
                "that at most a third of the training documents hold"
            )
        report = cls(trainer, tokenizer, text, recipe.sequence_length)
        report.before = report._measure()
        return report

    def end(self, run: RunFolder) -> dict[str, Any]:
        """Measure after the training, draw the picture, and return what the summary tells.

        Args:
            run: Where the picture goes.
        """
        after = self._measure()
        moments = {"before": describe_tail(self.before), "after": describe_tail(after)}
        change = {
            kind: {band: list(pair) for band, pair in one.items()} for kind, one in changes(self.before, after).items()
        }
        draw_tail(moments, run.path / "plots" / "long_tail.png", run.path.name)
        return {"long_tail": _without_nan({**moments, "change": change})}

    def _measure(self) -> dict[str, TailCounts]:
        return measure_tail(self.trainer.model, self.tokenizer, self.text, sequence_length=self.sequence_length)


def _without_nan(value: Any) -> Any:
    """JSON has no word for a drop from an accuracy of 0."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return finite_or_none(value)
