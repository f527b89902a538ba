"""What an adaptation is watched for, where its recipe says so: general text being forgotten, and the long tail."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_records.run_folder import RunFolder
from deepseek_training.data.corpus import Corpus
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe
from deepseek_training.trainer.bits_per_byte import BitsPerByte
from deepseek_training.trainer.early_stop import StopAtForgetting
from deepseek_training.trainer.held_out import HeldOut
from deepseek_training.trainer.tail_report import TailReport


@dataclasses.dataclass(frozen=True)
class AdaptationWatch:
    """Both, each None where it is not wanted.

    Attributes:
        recipe: The settings.
        stop: Ends the training early.
        tail: Measures the long tail.
    """

    recipe: AdaptRecipe
    stop: StopAtForgetting | None
    tail: TailReport | None

    @classmethod
    def begin(
        cls,
        recipe: AdaptRecipe,
        trainer: Any,
        tokenizer: Any,
        domain: Sequence[Corpus],
        *,
        held_out: Sequence[HeldOut],
        before: Mapping[str, BitsPerByte],
    ) -> "AdaptationWatch":
        """Measure what is measured before the training, and add to the trainer what ends it.

        Args:
            recipe: The settings.
            trainer: Before it trains.
            tokenizer: The model's.
            domain: The sources of the domain.
            held_out: The sets that are scored, those of the domain first.
            before: Bits per byte of each, in the same order.

        Raises:
            ValueError: Something is wanted that this model or these texts do not allow.
        """
        stop = None
        if recipe.stop_general_loss is not None:
            general = dict(list(before.items())[num_held_out(domain) :])
            stop = StopAtForgetting(trainer, general, recipe.stop_general_loss, recipe.stop_patience)
            trainer.add_callback(stop)
        return cls(recipe, stop, TailReport.begin(recipe, trainer, tokenizer, domain, held_out))

    @property
    def num_steps(self) -> int:
        """Steps of the training that the result has."""
        if self.stop is None or self.stop.stopped_at is None:
            return self.recipe.max_steps
        return self.stop.kept_step

    def details(self, run: RunFolder) -> dict[str, Any]:
        """Measure what is measured after the training, and return what the summary tells.

        Args:
            run: Where the picture goes.
        """
        stopped = {} if self.stop is None else self.stop.details
        return {**stopped, **({} if self.tail is None else self.tail.end(run))}


def num_held_out(corpora: Sequence[Corpus]) -> int:
    """Return how many of some data sets hold something out.

    Args:
        corpora: The data sets.
    """
    return sum(bool(len(corpus.validation)) for corpus in corpora)
