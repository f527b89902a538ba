"""Our card, results and report for models that any transformers `Trainer` pushes itself.

`Trainer(push_to_hub=True)` writes a card of its own right before it uploads its output folder; this callback writes
ours there instead, from what the Trainer logged. The Trainer offers no event between writing its card and uploading,
so the callback takes the place of the trainer's `create_model_card`. It also deletes ``training_args.bin``, which the
Trainer would upload with local paths and the access token in it.
"""

import dataclasses
import enum
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_model_cards.card.card import write_card
from deepseek_model_cards.card.license_facts import find_license
from deepseek_model_cards.hub.leak_check import UploadFile, check_leaks
from deepseek_model_cards.hub.push import edited_card_on_hub
from deepseek_model_cards.hub.upload_plan import CARD, drop_origin
from deepseek_model_cards.report.report import write_report
from deepseek_records.run_folder import RunFolder
from deepseek_records.stages import is_number
from deepseek_records.summary import DataUse, Result, Summary

logger = logging.getLogger(__name__)
# The Trainer leaves names that begin with an underscore out of its uploads.
RUN_FOLDER = "_run"
_LOCAL_SETTING = ("_dir", "_token", "hub_", "push_to_hub", "run_name", "report_to", "logging_", "save_", "trackio")
_SPEED = ("runtime", "per_second", "epoch")


class HubCardCallback(TrainerCallback):
    """Writes our card, results and report into what a `Trainer` pushes to the Hub.

    Args:
        trainer: The trainer; add the callback to it with ``trainer.add_callback(HubCardCallback(trainer))``.
        data: Data sets for the card.
        evaluated_on: The name of the evaluation data in results.
        license: The license of the weights, as the Hub spells it; by default the base model's, if that is known.
        with_report: Upload the report too; otherwise it stays in the run's folder beside the upload.

    Raises:
        ValueError: The Trainer is to push, and the license is not known.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data)  # doctest: +SKIP
        >>> trainer.add_callback(HubCardCallback(trainer))  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        data: Sequence[DataUse] = (),
        evaluated_on: str = "evaluation data",
        license: str | None = None,
        with_report: bool = False,
    ) -> None:
        self.trainer = trainer
        self.data = data
        self.evaluated_on = evaluated_on
        self.license = license
        self.with_report = with_report
        self.run: RunFolder | None = None
        self.started = time.monotonic()
        # The Trainer calls its own method when it pushes, and has no event for that.
        trainer.create_model_card = self.create_model_card

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the run folder, and warn where the Trainer would upload before we can clean."""
        if not state.is_world_process_zero:
            return
        self.started = time.monotonic()
        if args.push_to_hub and not find_license(self.license, folder=None, base=self._base()).is_known:
            raise ValueError("license: got none, expected HubCardCallback(license=...), for the Trainer is to push")
        self.run = _begin_run(Path(args.output_dir) / RUN_FOLDER, changed_settings(args), args.seed)
        if args.push_to_hub and args.hub_strategy != "end":
            logger.warning(
                "hub_strategy=%s uploads training_args.bin (local paths, access token) while training; "
                "set hub_strategy='end' to have only the cleaned, final upload",
                args.hub_strategy.value,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep what the Trainer logged."""
        if self.run is not None and logs:
            self.run.log({"step": state.global_step, **{key: v for key, v in logs.items() if is_number(v)}})

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write card and report in place of the Trainer's own card, and clean what it is about to upload.

        Args:
            *args: What `Trainer.create_model_card` takes; not used, for the run knows better.
            **kwargs: The same.

        Raises:
            ValueError: A file that would be uploaded holds a secret or a local path.
        """
        if not self.trainer.is_world_process_zero():
            return
        output = Path(self.trainer.args.output_dir)
        if self.run is None:
            self.run = _begin_run(output / RUN_FOLDER, changed_settings(self.trainer.args), self.trainer.args.seed)
        self.run.finish(self._summarize())
        self._write_card(output)
        write_report(self.run.path, (output if self.with_report else self.run.path) / "report.html")
        (output / "training_args.bin").unlink(missing_ok=True)
        _clean(output)

    def _base(self) -> str | None:
        """What the model was loaded from; None for one made from a configuration."""
        return getattr(self.trainer.model.config, "name_or_path", "") or None

    def _write_card(self, output: Path) -> None:
        """Write the card into the output, unless somebody's edits are there or on the Hub: then beside the run."""
        options = {
            "model_path": output if list(output.glob("*.safetensors")) else None,
            "license": self.license,
            "repo_id": self.trainer.hub_model_id,
        }
        edited = None
        api = HfApi(endpoint=constants.ENDPOINT, token=self.trainer.args.hub_token)
        if self.trainer.args.push_to_hub and self.trainer.hub_model_id:
            edited = edited_card_on_hub(api, self.trainer.hub_model_id)
        if edited is not None:
            (output / CARD).write_text(edited, encoding="utf-8")
        try:
            write_card(self.run.path, output=output, **options)
        except FileExistsError:
            logger.warning("README.md holds edits and stays; the card of this run is in %s", self.run.path)
            write_card(self.run.path, output=self.run.path, **options)

    def _summarize(self) -> Summary:
        """The summary of the run: the last value of everything evaluated."""
        last: dict[str, float] = {}
        for row in self.run.metrics:
            last.update({key[5:]: value for key, value in row.items() if key.startswith("eval_")})
        names = [key for key in last if not any(word in key for word in _SPEED)]
        rows = tuple(Result(metric=key, dataset=self.evaluated_on, value=last[key]) for key in names)
        return Summary(
            stage="train",
            base_model=self._base(),
            results=rows,
            data=tuple(self.data),
            seconds=time.monotonic() - self.started,
        )


def _begin_run(path: Path, settings: dict[str, Any], seed: int) -> RunFolder:
    """Take up the same unfinished run, else begin anew: the folder is ours alone, inside the trainer's output."""
    try:
        return RunFolder.create(path, settings, command="train", seed=seed)
    except FileExistsError:
        return RunFolder.create(path, settings, command="train", seed=seed, overwrite=True)


def changed_settings(args: Any) -> dict[str, Any]:
    """Return the training arguments that differ from their defaults, without local and secret ones.

    Args:
        args: A `TrainingArguments`.
    """
    settings = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)  # a declared field, so never missing
        value = value.value if isinstance(value, enum.Enum) else value
        is_local = any(part in field.name for part in _LOCAL_SETTING)
        if is_local or value == field.default or not isinstance(value, str | int | float | bool):
            continue
        settings[field.name] = value
    return settings


def _clean(output: Path) -> None:
    """Drop the origins from JSON files and refuse to go on where a secret or a local path is left."""
    files = []
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output)
        if not path.is_file() or name.parts[0].startswith(("_", "checkpoint-", ".cache")):
            continue
        cleaned = drop_origin(path)
        if cleaned is not None:
            path.write_bytes(cleaned)
        files.append(UploadFile(str(name), path))
    check_leaks(files, folders=[output.resolve(), Path.home()])
