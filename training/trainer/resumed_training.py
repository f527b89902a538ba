"""How every stage's trainer is saved and taken up again.

`ResumedTraining` goes before `Trainer`, or one of TRL's, among a class's bases. A checkpoint is written under a
temporary name, whole or every process its part, and read back by what knows the experts' names on disk.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME

from deepseek_records.loading import merge_adapter
from deepseek_records.run_folder import RunFolder
from deepseek_training.balance.training_figures import TrainingFigures
from deepseek_training.trainer.background_save import BackgroundSave
from deepseek_training.trainer.checkpoints import BEING_WRITTEN, load_weights, publish_checkpoint
from deepseek_training.trainer.chosen_experts import ChosenRows, RowAdamW, check_esft
from deepseek_training.trainer.expert_parallel import reshard
from deepseek_training.trainer.held_out import HeldOutSet
from deepseek_training.trainer.lora import ADAPTER_FOLDER, save_adapted, save_gathered_adapter
from deepseek_training.trainer.muon import build_muon, check_muon
from deepseek_training.trainer.slow_process import SlowProcess
from deepseek_training.trainer.split_checkpoint import (
    WriteParts,
    load_split_optimizer,
    load_split_weights,
    save_joined,
    save_split_optimizer,
    save_split_weights,
    write_parts,
)
from deepseek_training.trainer.spread import write_writer


class ResumedTraining:
    """How every stage's trainer is saved and taken up again, otherwise than the `Trainer` that it is mixed into.

    Attributes:
        recipe: The stage's settings.
        held_out: Sets whose content an interrupted run is held to.
        figures: The figures of the training, added to its log; None where none are collected.
        slow_process: Compares the processes' speed; None in one process.
        chosen: The slices of experts that alone train; empty where whole parameters do.
        is_over: Whether a run that goes on has nothing left to train.
    """

    recipe: Any
    held_out: Sequence[HeldOutSet] = ()
    figures: TrainingFigures | None = None
    slow_process: SlowProcess | None = None
    chosen: Sequence[ChosenRows] = ()
    is_over: bool = False
    _folder_being_written: Path | None = None

    @property
    def is_first(self) -> bool:
        """True in the process that writes the run folder."""
        return self.args.process_index == 0

    @property
    def _is_split_on_loading(self) -> bool:
        return getattr(self, "is_distributed_loading_by_transformers", False)  # transformers 5.17 has no such thing

    @property
    def writes_parts(self) -> bool:
        """True if each process writes its own part of a checkpoint."""
        if not self.is_fsdp_enabled:
            return self._is_split_on_loading
        return "SHARDED_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    @property
    def is_sharded(self) -> bool:
        """True if no process holds the whole model."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or self._is_split_on_loading

    def save_result(self, run: RunFolder, tokenizer: Any) -> None:
        """Write model and tokenizer into the run folder, gathered from all processes; an adapter also by itself.

        Args:
            run: The run folder.
            tokenizer: Saved beside the model.
        """
        if self.is_sharded and isinstance(self.model, PeftModel):
            self._save_sharded_adapter(run.path / ADAPTER_FOLDER, run.model_path)
        elif self.is_fsdp_enabled and self.writes_parts:
            save_joined(self.model, run.model_path)
        elif self.is_sharded:
            self.save_model(str(run.model_path), _internal_call=True)
            (run.model_path / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        elif self.is_first:
            save_adapted(self.model, run.path, run.model_path)
        if self.is_first:
            tokenizer.save_pretrained(run.model_path)

    def _save_sharded_adapter(self, adapter: Path, model_path: Path) -> None:
        """The adapter, gathered; the first process puts it on the whole model that the run started from."""
        if self.writes_parts:
            save_gathered_adapter(self.model, adapter)
        else:
            self.save_model(str(adapter), _internal_call=True)
        if self.is_first:
            (adapter / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            merge_adapter(str(adapter)).save_pretrained(model_path)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the recipe's optimizer.

        Args:
            model: In place of the trainer's.

        Raises:
            ValueError: Muon or ESFT, and the model is sharded.
        """
        reshard(self.model)
        if self.chosen:
            check_esft(self)
            self.optimizer = RowAdamW(
                self.chosen,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
            return self.optimizer
        if self.optimizer is not None or getattr(self.recipe, "optimizer", "adamw") != "muon":  # grpo has none
            optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
            if self.writes_parts:  # torch (2.13) cannot read a group without parameters, as an adapter leaves one
                optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            return optimizer
        check_muon(self)
        args = self.args
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer = build_muon(self.model, lr=args.learning_rate, weight_decay=args.weight_decay, betas=betas)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """Return the batches of a step, and count the time that they take to read."""
        batches = epoch_iterator if self.slow_process is None else self.slow_process.timed(epoch_iterator)
        return super().get_batch_samples(batches, *args, **kwargs)

    def _run_epoch(self, **kwargs: Any) -> None:
        """Run an epoch unless the training is done already.

        `Trainer` (5.23) looks for the last step only after a step: resumed from its checkpoint it would train one
        too many.
        """
        if self.is_over or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save under a temporary name; it is renamed when every process has written all of its files."""
        self.finish_saving(wait=True)
        self._folder_being_written = Path(self.args.output_dir, BEING_WRITTEN)
        try:
            super()._save_checkpoint(model, trial)
            written = self._folder_being_written / f"checkpoint-{self.state.global_step}"
        finally:
            self._folder_being_written = None
        if self._background is None:
            publish_checkpoint(written, is_first=self.is_first)

    def finish_saving(self, *, wait: bool) -> None:
        """Give a checkpoint that is written in the background its name, if all processes have written it; all call it.

        Args:
            wait: Until they have.
        """
        if self._background is not None:
            self._background.publish_when_written(is_first=self.is_first, device=self.args.device, wait=wait)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder_being_written or super()._get_output_dir(trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, in a checkpoint of parts every process its own.

        Args:
            output_dir: The folder.
            _internal_call: As for `transformers.Trainer.save_model`.
        """
        if self._folder_being_written is not None and self.writes_parts:
            save_split_weights(self.model, Path(output_dir), self._write)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write both, of a split model every process its part, and who wrote them."""
        if self.writes_parts:
            save_split_optimizer(self.model, self._bare_optimizer, Path(output_dir), self._write)
            if self.is_first:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        if self.is_first:
            write_writer(Path(output_dir), self)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read what `_save_optimizer_and_scheduler` wrote."""
        if checkpoint is None or not self.writes_parts:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_split_optimizer(self.model, self._bare_optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    @property
    def is_saved_in_background(self) -> bool:
        """True if the training goes on while a checkpoint is written."""
        recipe = self.recipe  # stages that write no parts have no such setting
        return hasattr(recipe, "save_in_background") and bool(recipe.save_in_background)

    @functools.cached_property
    def _background(self) -> BackgroundSave | None:
        return BackgroundSave(self.args.ddp_timeout) if self.is_saved_in_background else None

    @property
    def _write(self) -> WriteParts:
        return write_parts if self._background is None else self._background.write

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # out of accelerate's wrapper

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load a checkpoint by `load_weights`, which knows the experts' names on disk, and an adapter by PEFT."""
        if self.writes_parts:
            load_split_weights(self.model, Path(resume_from_checkpoint))
            return
        if self.is_sharded or isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_weights(self.model if model is None else model, resume_from_checkpoint)
