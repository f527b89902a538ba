"""Runs ``deepseek-moe pretrain`` as one process of several and has it fail in the middle of a checkpoint.

Started by `test_distributed` through ``accelerate launch``. At the checkpoint of step SAVE_STEP the last process has
written its weights; then it is killed (FAULT ``kill``), or may write no file above 100 kB (``full``). Every earlier
checkpoint that is written in the background waits until the training is two steps further.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from deepseek_cli.main import main
from deepseek_training.trainer import stage_trainer

trainers = []
init = stage_trainer.StageTrainer.__init__


def keep(self, *args, **kwargs):
    init(self, *args, **kwargs)
    trainers.append(self)


def step_of(writer):
    names = [part for part in Path(writer.path).parts if part.startswith("checkpoint-")]
    return int(names[0].split("-")[1]) if names else 0  # of the model at the end


def wait_or_fail(writer):
    """In the thread that writes, of a run that saves in the background; else in the only one."""
    (trainer,), step = trainers, step_of(writer)
    if trainer.recipe.save_in_background and step < int(os.environ["SAVE_STEP"]):
        while trainer.state.global_step < step + 2:
            time.sleep(0.01)
    elif step == int(os.environ["SAVE_STEP"]) and type(writer) is FileSystemWriter and os.environ["RANK"] == "1":
        if os.environ["FAULT"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def patch(kind):
    write = kind.write_data

    def write_data(self, *args, **kwargs):
        wait_or_fail(self)
        return write(self, *args, **kwargs)

    kind.write_data = write_data


stage_trainer.StageTrainer.__init__ = keep
for kind in (HuggingFaceStorageWriter, FileSystemWriter):
    patch(kind)
sys.exit(main(sys.argv[1:]))
