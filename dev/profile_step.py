"""Where the time of a training step on a CPU goes: model math, or what stands around it.

    OMP_NUM_THREADS=1 python dev/profile_step.py FOLDER [--recipe pretrain-demo] [--steps 10]

Trains a recipe through its stage. Some steps run undisturbed, for the processor's seconds of a whole step (data,
callbacks and log included); as many then run under torch's profiler, which tells what each operator took by itself.
Shares are of the profiled steps, on one clock, so that other work on the machine slows both; the profiler's own cost
counts against the math.
Model math is what operators took: products, attention, normalization, losses, their gradients, clipping and the
optimizer's update. The rest of a step is Python and the autograd engine between them, data, callbacks and logging.
"""

import argparse
import itertools
import re
import statistics
import time
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from deepseek_training.recipes.loading import load_recipe
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe
from deepseek_training.stages import pretrain as stage

_WARM_UP = 5
# By the operator's name, the first that fits.
_KINDS = (
    ("products", r"mm$|linear|baddbmm|matmul|mv$|mkldnn"),
    ("attention", r"attention"),
    ("softmax, losses", r"softmax|nll_loss|cross_entropy|sigmoid|silu"),
    ("sums, copies, gathers", r"copy_|cat$|index|gather|scatter|sum|sort|topk|embedding|fill_|zero_|empty|clone|to$"),
    ("other arithmetic", r""),
)
_OPERATOR = re.compile(r"^(aten|deepseek\w*|torch\w*|prims)::")


class StepProfile(TrainerCallback):
    """Times steps, then profiles as many.

    Args:
        num_steps: Of each.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.times: list[float] = []
        self.clock: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time; begin and end the profile."""
        self.times.append(time.process_time())
        self.clock.append(time.perf_counter())
        if state.global_step == _WARM_UP + self.num_steps:
            self.profiler.start()
        if state.global_step == _WARM_UP + 2 * self.num_steps:
            self.profiler.stop()

    @property
    def step_s(self) -> float:
        """The processor's seconds of a step without the profiler."""
        times = self.times[_WARM_UP : _WARM_UP + self.num_steps + 1]
        return statistics.median(after - before for before, after in itertools.pairwise(times))

    @property
    def profiled_step_s(self) -> float:
        """The seconds of a step under the profiler, on the clock that it measures operators by."""
        first = _WARM_UP + self.num_steps
        return (self.clock[first + self.num_steps] - self.clock[first]) / self.num_steps

    def by_kind(self) -> dict[str, float]:
        """Return the seconds of a step that operators took themselves, by kind."""
        found = dict.fromkeys((name for name, _ in _KINDS), 0.0)
        for event in self.profiler.key_averages():
            if _OPERATOR.match(event.key):
                kind = next(name for name, pattern in _KINDS if re.search(pattern, event.key))
                found[kind] += event.self_cpu_time_total / 1e6 / self.num_steps
        return found


def main() -> None:
    """Train, profile and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="pretrain-demo")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    watcher = StepProfile(args.steps)
    original = stage.run_training

    def watched(trainer: Any, *rest: Any, **options: Any) -> None:
        trainer.add_callback(watcher)
        original(trainer, *rest, **options)

    stage.run_training = watched
    short = {"max_steps": _WARM_UP + 2 * args.steps + 1, "eval_steps": 0, "save_steps": 0, "sample_steps": 0}
    quick = {"warmup_steps": 1, "eval_bytes": 10_000, "check_bigram": False, "report_to": [], "sample_prompts": []}
    stage.pretrain(load_recipe(args.recipe, PretrainRecipe, {**short, **quick}), args.folder, overwrite=True)
    kinds = watcher.by_kind()
    print("| part of a step | ms | share |\n| --- | --- | --- |")
    for name, seconds in kinds.items():
        print(f"| {name} | {seconds * 1e3:.0f} | {seconds / watcher.profiled_step_s:.1%} |")
    math = sum(kinds.values())
    print(f"| model math | {math * 1e3:.0f} | {math / watcher.profiled_step_s:.1%} |")
    print(f"| whole step, profiled | {watcher.profiled_step_s * 1e3:.0f} | |")
    print(f"without the profiler a step takes {watcher.step_s * 1e3:.0f} ms of the processor")
    print(watcher.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
