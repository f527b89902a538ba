"""Stops a training whose numbers have become NaN or infinite, before such weights are saved or sampled from.

`run_training` adds the callback, `CorrectedPPOTrainer` asks `refuse_divergence` itself. The weights are
looked at as well, for the gradient at which they burst is often still finite.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_records.exit_codes import RunFailedError
from deepseek_training.trainer.first_burst import FirstBurst


class DivergedError(RunFailedError, ValueError):
    """The figures or the weights of a training are no longer finite."""


class StopWhenDiverged(TrainerCallback):
    """Checks each line of the log; `Trainer` logs before it saves.

    Args:
        first_burst: Knows where it began, for the message.
    """

    def __init__(self, first_burst: FirstBurst) -> None:
        self.first_burst = first_burst

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise a one-line `DivergedError` at a training line that is not finite."""
        if logs and "loss" in logs:
            figures = {name: logs[name] for name in ("loss", "grad_norm") if name in logs}
            refuse_divergence(model, state.global_step, args.learning_rate, figures, self.first_burst)


def refuse_divergence(
    model: nn.Module,
    step: int,
    learning_rate: float,
    figures: dict[str, Any],
    first_burst: FirstBurst | None = None,
) -> None:
    """Raise `DivergedError` unless figures and weights are finite.

    Args:
        model: Its weights count where this process holds them whole.
        step: For the message.
        learning_rate: For the message.
        figures: What the step logs.
        first_burst: Asked where it began.

    Raises:
        DivergedError: Something is NaN or infinite; the message names it.
    """
    burst = next((f"{name} is {float(value)}" for name, value in figures.items() if not math.isfinite(value)), None)
    if burst is None and not _has_finite_weights(model):
        burst = "the weights are no longer finite"
    if burst is not None:
        began = None if first_burst is None else first_burst.describe()
        where = "" if began is None else f" ({began})"
        raise DivergedError(
            f"training: {burst} at step {step}{where}, before anything of that step was saved; a smaller "
            f"learning_rate (now {learning_rate:g}) may help"
        )


@torch.no_grad()
def _has_finite_weights(model: nn.Module) -> bool:
    # One process of FSDP2 or ZeRO-3 has parts only, and would raise while the others wait for it.
    whole = [p for p in model.parameters() if not hasattr(p, "full_tensor") and not hasattr(p, "ds_id")]
    return not whole or bool(torch.stack([p.isfinite().all() for p in whole]).all())
