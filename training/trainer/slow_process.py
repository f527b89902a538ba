"""Names the process that the others wait for, whose device or data is slower than theirs.

A step takes as long everywhere, for the processes wait for one another in it. `SlowProcess` times what each does
alone: the attention of each layer going forward, and the reading of its data. All exchange both at each log line.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# A process is slow that takes so many times the others' median, in so many log lines one after another.
SLOW_RATIO, SLOW_LINES = 1.5, 2
# Below this a step's difference is what any machine has, in seconds.
_LEAST_S = 0.002
_WHAT = ("its layers' attention", "reading its data")


class SlowProcess(TrainerCallback):
    """Warns once of each slow process, with the step and how much slower it is.

    Args:
        model: Whose attention is timed: the modules named so, and not those within one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._told: set[int] = set()
        self._seconds = [0.0, 0.0]
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: Any = None
        self._num_slow: dict[tuple[int, int], int] = {}
        self._first_step = 1
        inside = ""
        for name, module in model.named_modules():
            if type(module).__name__.endswith("Attention") and not (inside and name.startswith(inside)):
                inside = f"{name}."
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end)

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not module.training:
            return
        if torch.cuda.is_available():
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()
        else:
            self._begun = time.perf_counter()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not module.training or self._begun is None:
            return
        if torch.cuda.is_available():
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            self._spans.append((self._begun, ended))
        else:
            self._seconds[0] += time.perf_counter() - self._begun
        self._begun = None

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Return the same batches; the time until each is there counts as reading.

        Args:
            batches: Of this process.
        """
        while True:
            begun = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._seconds[1] += time.perf_counter() - begun
            yield batch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where the first window begins."""
        self._first_step = state.global_step + 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare the processes over the steps since the last line; all call it."""
        if args.world_size == 1 or not logs or "loss" not in logs:
            return
        if self._spans:
            torch.cuda.synchronize()
            self._seconds[0] += sum(begun.elapsed_time(ended) for begun, ended in self._spans) / 1000
        own = torch.tensor(self._seconds, dtype=torch.float64, device=args.device)
        tables = [torch.empty_like(own) for _ in range(args.world_size)]
        torch.distributed.all_gather(tables, own)
        found = torch.stack(tables).T.tolist()
        steps = range(self._first_step, state.global_step + 1)
        for place, seconds in enumerate(found):
            for line in self.compare(place, [one / len(steps) for one in seconds], steps):
                if args.process_index == 0:
                    logger.warning(line)
        self._seconds, self._spans, self._first_step = [0.0, 0.0], [], state.global_step + 1

    def compare(self, place: int, seconds: list[float], steps: range) -> Iterator[str]:
        """Give a line on each process that has been slow long enough and is not told of yet.

        Args:
            place: 0 for attention, 1 for reading.
            seconds: Of each process, per step.
            steps: Over which they were taken.
        """
        for process, own in enumerate(seconds):
            others = sorted(seconds[:process] + seconds[process + 1 :])
            median = others[len(others) // 2]
            is_slow = own > SLOW_RATIO * median and own - median > _LEAST_S
            self._num_slow[place, process] = self._num_slow.get((place, process), 0) + 1 if is_slow else 0
            if self._num_slow[place, process] < SLOW_LINES or process in self._told:
                continue
            self._told.add(process)
            yield (
                f"process {process} is slow: {own / max(median, 1e-9):.1f} times the others' time for {_WHAT[place]} "
                f"in steps {steps[0]} to {steps[-1]} ({own:.2g} s against {median:.2g} s per step); all wait for it"
            )
