"""The training that `pretrain`, `adapt` and `sft` share: a `Trainer` in a run folder, with exact resume.

Ours are the evaluation in bits per byte, the figures of the experts, and going on from the last complete checkpoint. A
run that was killed ends with the same bits as one that was not: the log window, the data order, the random state and
the routers' controllers all restart at a checkpoint.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, Trainer
from transformers.utils.logging import disable_progress_bar

from deepseek_records.run_folder import RunFolder
from deepseek_records.stop_signals import undeferred
from deepseek_records.summary import Sample
from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.balance.expert_load_plot import LoadPlot
from deepseek_training.balance.training_figures import TrainingFigures
from deepseek_training.data.mixture import Mixture
from deepseek_training.recipes.pretrain_and_adapt import TrainerSettings
from deepseek_training.trainer.background_save import PublishWhenWritten, check_background
from deepseek_training.trainer.checkpoints import last_complete_checkpoint
from deepseek_training.trainer.chosen_experts import ChosenRows
from deepseek_training.trainer.course_plot import CoursePlot
from deepseek_training.trainer.distributed_engine import check_engine
from deepseek_training.trainer.divergence import StopWhenDiverged
from deepseek_training.trainer.first_burst import FirstBurst
from deepseek_training.trainer.held_out import HeldOutSet, bits_figures, measure_sets
from deepseek_training.trainer.inputs_held import hold_inputs
from deepseek_training.trainer.interruption import train_until_stopped
from deepseek_training.trainer.lost_process import telling_of_lost_processes
from deepseek_training.trainer.resumed_training import ResumedTraining
from deepseek_training.trainer.run_callbacks import MetricsFile, ProgressBar
from deepseek_training.trainer.sample_log import SampleLog
from deepseek_training.trainer.slow_process import SlowProcess
from deepseek_training.trainer.split_checkpoint import check_parts, saving_otherwise
from deepseek_training.trainer.spread import check_writer
from deepseek_training.trainer.whereabouts import Whereabouts

logger = logging.getLogger(__name__)


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
    check_background(trainer)
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
    for callback in (*written, bar, *watching, PublishWhenWritten(trainer)):
        trainer.add_callback(callback)
    whereabouts = None
    if trainer.args.world_size > 1:
        trainer.slow_process = SlowProcess(trainer.model)
        whereabouts = Whereabouts(trainer.model, trainer.args)
        trainer.add_callback(trainer.slow_process)
        trainer.add_callback(whereabouts)
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
    with contextlib.closing(bar), telling_of_lost_processes(trainer, whereabouts):
        train_until_stopped(trainer, checkpoint)
