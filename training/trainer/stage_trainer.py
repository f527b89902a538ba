"""The training that `pretrain`, `adapt` and `sft` share: a `Trainer` in a run folder, with exact resume.

Ours are the evaluation in bits per byte, the figures of the experts, and going on from the last complete checkpoint. A
run that was killed ends with the same bits as one that was not: the log window, the data order, the random state and
the routers' controllers all restart at a checkpoint.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback, Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.utils.logging import disable_progress_bar

from deepseek_records.run_folder import RunFolder
from deepseek_records.stop_signals import undeferred
from deepseek_records.summary import Sample
from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.balance.expert_load_plot import LoadPlot
from deepseek_training.balance.training_figures import TrainingFigures
from deepseek_training.data.mixture import Mixture
from deepseek_training.recipes.pretrain_and_adapt import TrainerSettings
from deepseek_training.trainer.checkpoints import (
    BEING_WRITTEN,
    CheckpointMarker,
    last_complete_checkpoint,
    load_weights,
    publish_checkpoint,
)
from deepseek_training.trainer.chosen_experts import ChosenRows, RowAdamW, check_esft
from deepseek_training.trainer.course_plot import CoursePlot
from deepseek_training.trainer.distributed_engine import check_engine
from deepseek_training.trainer.divergence import StopWhenDiverged
from deepseek_training.trainer.first_burst import FirstBurst
from deepseek_training.trainer.held_out import HeldOutSet, bits_figures, measure_sets
from deepseek_training.trainer.inputs_held import hold_inputs
from deepseek_training.trainer.interruption import train_until_stopped
from deepseek_training.trainer.lora import save_adapted
from deepseek_training.trainer.lost_process import telling_of_lost_processes
from deepseek_training.trainer.muon import build_muon, check_muon
from deepseek_training.trainer.run_callbacks import MetricsFile, ProgressBar
from deepseek_training.trainer.sample_log import SampleLog
from deepseek_training.trainer.split_checkpoint import (
    check_parts,
    load_split_optimizer,
    load_split_weights,
    save_joined,
    save_split_optimizer,
    save_split_weights,
    saving_otherwise,
)
from deepseek_training.trainer.spread import check_writer, write_writer

logger = logging.getLogger(__name__)


class ResumedTraining:
    """How every stage's trainer is saved and taken up again, otherwise than the `Trainer` that it is mixed into.

    Attributes:
        recipe: The stage's settings.
        held_out: Sets whose content an interrupted run is held to.
        figures: The figures of the training, added to its log; None where none are collected.
        chosen: The slices of experts that alone train; empty where whole parameters do.
        is_over: Whether a run that goes on has nothing left to train.
    """

    recipe: Any
    held_out: Sequence[HeldOutSet] = ()
    figures: TrainingFigures | None = None
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
        if self.is_fsdp_enabled and self.writes_parts:
            save_joined(self.model, run.model_path)
        elif self.is_sharded:
            self.save_model(str(run.model_path), _internal_call=True)
            (run.model_path / "training_args.bin").unlink(missing_ok=True)
        elif self.is_first:
            save_adapted(self.model, run.path, run.model_path)
        if self.is_first:
            tokenizer.save_pretrained(run.model_path)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the recipe's optimizer.

        Args:
            model: In place of the trainer's.

        Raises:
            ValueError: Muon or ESFT, and the model is sharded.
        """
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
            return super().create_optimizer() if model is None else super().create_optimizer(model)
        check_muon(self)
        args = self.args
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer = build_muon(self.model, lr=args.learning_rate, weight_decay=args.weight_decay, betas=betas)
        return self.optimizer

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
        self._folder_being_written = Path(self.args.output_dir, BEING_WRITTEN)
        try:
            super()._save_checkpoint(model, trial)
            written = self._folder_being_written / f"checkpoint-{self.state.global_step}"
        finally:
            self._folder_being_written = None
        publish_checkpoint(written, is_first=self.is_first)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder_being_written or super()._get_output_dir(trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, in a checkpoint of parts every process its own.

        Args:
            output_dir: The folder.
            _internal_call: As for `transformers.Trainer.save_model`.
        """
        if self._folder_being_written is not None and self.writes_parts:
            save_split_weights(self.model, Path(output_dir))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write both, of a split model every process its part, and who wrote them."""
        if self.writes_parts:
            save_split_optimizer(self.model, self._bare_optimizer, Path(output_dir))
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


class StageTraining(ResumedTraining):
    """What every stage's trainer does otherwise than the `Trainer` that it is mixed into.

    Args:
        recipe: The stage's settings.
        held_out: The sets that `evaluate` scores.
        **kwargs: As for the trainer it is mixed into.

    Attributes:
        figures: The figures of the training, added to its log.
    """

    figures: TrainingFigures

    def __init__(self, recipe: TrainerSettings, held_out: Sequence[HeldOutSet], **kwargs: Any) -> None:
        with saving_otherwise(kwargs["args"], kwargs["model"]):
            super().__init__(**kwargs)
        self.recipe = recipe
        self.held_out = held_out
        self.figures = TrainingFigures.attach(self, balance=ExpertBalanceCallback(recipe.bias_update_speed))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score every held-out set; log and return ``eval_<name>_bits_per_byte``."""
        with undeferred():
            metrics = bits_figures(measure_sets(self.held_out, self.model_wrapped, self.recipe))
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class StageTrainer(StageTraining, Trainer):
    """Trains on blocks, and evaluates in bits per byte instead of the mean loss of blocks.

    Args:
        recipe: The stage's settings.
        held_out: The sets that `evaluate` scores.
        dataset: Blocks to train on.
        chosen: The slices of experts that alone train; none where whole parameters do.
        **kwargs: As for `transformers.Trainer`.
    """

    def __init__(
        self,
        recipe: TrainerSettings,
        held_out: Sequence[HeldOutSet],
        *,
        dataset: torch.utils.data.Dataset,
        chosen: Sequence[ChosenRows] = (),
        **kwargs: Any,
    ) -> None:
        # Trainer wants an evaluation set; `evaluate` reads `held_out`.
        evaluated = dataset if recipe.eval_steps else None
        super().__init__(recipe, held_out, train_dataset=dataset, eval_dataset=evaluated, **kwargs)
        self.chosen = chosen

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler | None:
        """A mixture has its order."""
        if isinstance(self.train_dataset, Mixture):
            return torch.utils.data.SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Documents that share a row are kept apart by their positions only where there is no cache."""
        prepared = super()._prepare_inputs(inputs)
        return {**prepared, "use_cache": False} if "position_ids" in prepared else prepared


def run_training(
    trainer: ResumedTraining, run: RunFolder, write_samples: Callable[[], Sequence[Sample]] | None = None
) -> None:
    """Train in place, from the run's last complete checkpoint if it has one, with the stage's callbacks.

    Args:
        trainer: A stage's.
        run: The run folder.
        write_samples: What the model writes now; called every `sample_steps` of the recipe.
    """
    check_engine(trainer.accelerator)
    check_parts(trainer)
    is_loaded = isinstance(getattr(trainer.recipe, "model", None), str)  # a new model is what its settings make of it
    rows = (row for one in trainer.held_out for row in one.rows)
    base = trainer.model if is_loaded else None
    hold_inputs(run, trainer.args, data=trainer.train_dataset, held_out=rows, model=base)
    trainer.remove_callback(PrinterCallback)
    disable_progress_bar()  # "Writing model shards" would break our bar's line at every checkpoint
    bar = ProgressBar(run.path.name)
    burst = FirstBurst(trainer.model)
    watching = (burst, StopWhenDiverged(burst))
    written = (MetricsFile(run, trainer.figures), LoadPlot(run), CoursePlot(run))
    for callback in (*written, bar, *watching, CheckpointMarker()):
        trainer.add_callback(callback)
    if write_samples is not None:
        trainer.add_callback(SampleLog(run, trainer.recipe.sample_steps, write_samples))
    checkpoint = last_complete_checkpoint(run.path / "checkpoints")
    if checkpoint:
        check_writer(checkpoint, trainer)
        if trainer.is_first:
            logger.warning("going on from %s", checkpoint)
        loads = [row["tokens_per_expert"] for row in run.metrics if "tokens_per_expert" in row]
        if trainer.figures is not None:
            trainer.figures.take_logged_load(loads[-1] if loads else [])
    with contextlib.closing(bar), telling_of_lost_processes(trainer):
        train_until_stopped(trainer, checkpoint)
