"""One process of `measure_on_cluster.sh`: a stage of deepseek-moe with its steps timed, or the exchange alone.

``cluster_worker.py train ARGUMENTS`` runs ``deepseek-moe ARGUMENTS``; the first process writes the seconds of each
step, and of what stands between it and the next, into the file TIMES. With STOP_AT every process ends in that step.
``cluster_worker.py exchange HIDDEN`` times what expert parallelism sends, from and to every process.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

RANK = int(os.environ.get("RANK", "0"))


class Times(TrainerCallback):
    """Seconds of each step, and between steps, as this process sees them."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.between: list[float] = []
        self.ended = self.begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the beginning; with STOP_AT, end."""
        self.begun = _now()
        if self.ended:
            self.between.append(self.begun - self.ended)
        if state.global_step + 1 == int(os.environ.get("STOP_AT", "0")):
            os._exit(9)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the end."""
        self.ended = _now()
        self.steps.append(self.ended - self.begun)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the file."""
        if RANK == 0 and "TIMES" in os.environ:
            Path(os.environ["TIMES"]).write_text(json.dumps({"steps": self.steps, "between": self.between}))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(arguments: list[str]) -> int:
    """Run the command with the times taken."""
    from deepseek_cli.main import main
    from deepseek_training.trainer import stage_trainer

    build = stage_trainer.StageTrainer.__init__

    def build_timed(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.add_callback(Times())

    stage_trainer.StageTrainer.__init__ = build_timed
    return main(arguments)


def exchange(hidden: int) -> int:
    """Time all-to-all of bf16 tokens, at a few numbers of them per process."""
    has_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if has_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    world = dist.get_world_size()
    found = {}
    for tokens in (1024, 8192, 65536) if has_gpu else (1024,):
        sent = torch.ones(tokens // world * world, hidden, dtype=torch.bfloat16, device=device)
        received = torch.empty_like(sent)
        seconds = []
        for _ in range(20):
            dist.barrier()
            begun = _now()
            dist.all_to_all_single(received, sent)
            seconds.append(_now() - begun)
        median = sorted(seconds[5:])[7]
        found[tokens] = {"ms": 1000 * median, "gb_per_s": sent.nbytes * (world - 1) / world / median / 1e9}
    if RANK == 0:
        Path(os.environ["TIMES"]).write_text(json.dumps({"processes": world, "hidden": hidden, "tokens": found}))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(train(sys.argv[2:]) if sys.argv[1] == "train" else exchange(int(sys.argv[2])))
