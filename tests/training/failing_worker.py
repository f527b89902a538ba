"""Runs ``deepseek-moe pretrain`` as one process of several and has it fail as the environment says.

Started by `test_failing_processes` through torchrun. FAULT is ``kill``, ``hang`` or ``nan``, which the last process
has in step FAULT_STEP; or ``deaths``: in every step a process chosen by chance is killed with a chance of a third, as
often as DEATHS says, which the file DEATH_FILE counts; or ``slow`` or ``slow_data``, as the last process then is.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from deepseek_cli.main import main
from deepseek_training.data.packing import PackedDataset
from deepseek_training.stages import pretrain
from deepseek_training.trainer import stage_trainer
from modeling_deepseek.decoder_layer import DeepseekAttention

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_by_chance(step, is_last):
    """The same draw in every process, another one after every restart; in the last step die for certain."""
    counter = Path(os.environ["DEATH_FILE"])
    deaths = len(counter.read_text()) if counter.exists() else 0
    draw = random.Random(f"{step} {deaths}")
    is_time = draw.random() < 1 / 3 or is_last
    if deaths < int(os.environ["DEATHS"]) and is_time and draw.randrange(WORLD_SIZE) == RANK:
        with counter.open("a") as file:
            file.write("x")
        die()


def be_slow(kind):
    """Sleep in the attention of a layer, or where a row of the data is read."""
    owner, name = {"slow": (DeepseekAttention, "forward"), "slow_data": (PackedDataset, "__getitem__")}[kind]
    original = getattr(owner, name)

    def slower(*args, **kwargs):
        time.sleep(0.03)
        return original(*args, **kwargs)

    setattr(owner, name, slower)


class FailingTrainer(stage_trainer.StageTrainer):
    """Fails before the forward pass of a step."""

    def compute_loss(self, model, *args, **kwargs):
        fault, step = os.environ["FAULT"], self.state.global_step + 1
        if fault == "deaths":
            die_by_chance(step, step == self.state.max_steps)
        elif RANK == WORLD_SIZE - 1 and step == int(os.environ["FAULT_STEP"]):
            if fault == "kill":
                die()
            elif fault == "hang":
                self.model.model.layers[1].self_attn.register_forward_hook(lambda *_: time.sleep(600))
            else:
                with torch.no_grad():
                    self.model.model.layers[1].self_attn.o_proj.weight.fill_(float("nan"))
        return super().compute_loss(model, *args, **kwargs)


if os.environ["FAULT"].startswith("slow") and RANK == WORLD_SIZE - 1:
    be_slow(os.environ["FAULT"])
if not os.environ["FAULT"].startswith("slow"):
    pretrain.StageTrainer = FailingTrainer
sys.exit(main(sys.argv[1:]))
