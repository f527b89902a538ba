"""Samples over time: what the model writes of the same few prompts every `sample_steps` steps.

They are kept in the run folder's ``samples.jsonl`` as they come, and in the summary in the end, from where the report
shows them. Writing them leaves the training bit for bit as it would be without.
"""

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_records.run_folder import RunFolder, write_text
from deepseek_records.stop_signals import undeferred
from deepseek_records.summary import Sample

SAMPLES_FILE = "samples.jsonl"


class SampleLog(TrainerCallback):
    """Writes samples every so many steps.

    Args:
        run: The run.
        every: Steps between them; 0 for none.
        write: Returns the samples of the model as it is; called in every process.
    """

    def __init__(self, run: RunFolder, every: int, write: Callable[[], Sequence[Sample]]) -> None:
        self.run = run
        self.every = every
        self.write = write

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write, but after the last step, whose samples the stage writes itself."""
        step = state.global_step
        if not self.every or step % self.every or step >= state.max_steps:
            return
        model = kwargs["model"]
        was_training = model.training
        try:
            with undeferred(), random_state_kept():
                samples = self.write()
        finally:
            model.train(was_training)
        if state.is_world_process_zero:
            with open(self.run.path / SAMPLES_FILE, "a", encoding="utf-8") as file:
                for one in samples:
                    row = {"step": step, "prompt": one.prompt, "completion": one.completion}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random state of torch, numpy and Python as it was."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def samples_over_time(run: RunFolder) -> tuple[Sample, ...]:
    """Return what `SampleLog` wrote, in order; a last line cut short by a kill is left out.

    Args:
        run: The run.
    """
    return tuple(Sample(**row) for row in _read(run))


def drop_samples_after(run: RunFolder, step: int) -> None:
    """Leave only the samples up to a step, for a resumed run writes the later ones again.

    Args:
        run: The run.
        step: The step of the checkpoint it goes on from.
    """
    if not (run.path / SAMPLES_FILE).exists():
        return
    rows = [row for row in _read(run) if row["step"] <= step]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(run.path / SAMPLES_FILE, lines)


def _read(run: RunFolder) -> list[dict[str, Any]]:
    path = run.path / SAMPLES_FILE
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]
