"""What the stages do alike that make a model of another without training: `shrink`, `quantize` and `upcycle`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepseek_records.hashes import hash_model, hash_tokenizer
from deepseek_records.loading import check_vocabulary, load_model
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Summary
from deepseek_training.data.corpus import Corpus
from deepseek_training.data.texts import data_name, describe_data
from deepseek_training.recipes.loading import recipe_settings
from deepseek_training.trainer.held_out import HeldOut
from deepseek_training.trainer.outcome import bits_rows


class Settings(Protocol):
    """What every such stage is told.

    Attributes:
        model: Of which model.
        data: By what text.
        eval_bytes: Of its held-out part, measured before and after.
    """

    model: str
    data: str
    eval_bytes: int | None


@dataclass
class Remaking:
    """A run that has its model and has not made the other one yet.

    Attributes:
        command: The stage's name.
        run: The run folder.
        settings: The stage's.
        model: The model that is there.
        tokenizer: Of both.
        held_out: What both are measured on.
        started: When the stage began, by `time.monotonic`.
    """

    command: str
    run: RunFolder
    settings: Any
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    held_out: HeldOut
    started: float

    def finish(self, num_parameters: int, **outcome: Any) -> Summary:
        """Save the tokenizer beside the model that was saved, and return the run's summary.

        Args:
            num_parameters: Of the model that was made.
            **outcome: Further fields of the summary.
        """
        self.tokenizer.save_pretrained(self.run.model_path)
        summary = Summary(
            stage=self.command,
            base_model=self.settings.model,
            data=(describe_data(self.settings.data, "validation", self.held_out.texts, "evaluation"),),
            num_parameters=num_parameters,
            seconds=round(time.monotonic() - self.started, 1),
            **outcome,
        )
        return self.run.finish(summary)

    def finish_beside(self, made: PreTrainedModel, details: dict[str, Any]) -> Summary:
        """Measure both models, save the one that was made, and return the run's summary.

        Args:
            made: The other model.
            details: Of the summary.
        """
        before, after = (self.held_out.measure(one, self.settings) for one in (self.model, made))
        made.save_pretrained(self.run.model_path)
        name = self.held_out.name
        results = bits_rows({name: before}, when="before") + bits_rows({name: after}, when="after")
        return self.finish(made.num_parameters(), results=results, details=details)


def open_remaking(
    settings: Settings,
    output: str | Path,
    *,
    command: str,
    told: str,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    started: float,
    overwrite: bool,
    is_dry: bool,
) -> Remaking | None:
    """Load the model and open the run, or print what would be made and return None.

    Args:
        settings: The stage's, checked.
        output: The run folder.
        command: The stage's name.
        told: One line or more on what is made.
        corpus: The text.
        tokenizer: The model's.
        started: When the stage began, by `time.monotonic`.
        overwrite: Delete whatever run the folder holds.
        is_dry: Write nothing.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: The model is missing.
        ValueError: Its vocabulary is smaller than the tokenizer's.
    """
    values = recipe_settings(settings)
    if is_dry:
        if not overwrite:
            RunFolder.check(output, values)
        print(f"{told}\ndry run: nothing was written", flush=True)
        return None
    model = load_model(settings.model, dtype="auto")
    check_vocabulary(model, tokenizer)
    run = RunFolder.create(output, values, command=command, overwrite=overwrite)
    run.hold_to(model=hash_model(model), tokenizer=hash_tokenizer(tokenizer))
    held_out = HeldOut.prepare(data_name(settings.data), corpus.validation, tokenizer, settings.eval_bytes)
    return Remaking(command, run, settings, model, tokenizer, held_out, started)
