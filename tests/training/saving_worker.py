"""Runs ``deepseek-moe pretrain`` as one process of several and has it fail in the middle of a checkpoint.

Started by `test_distributed` through ``accelerate launch``. At the checkpoint of step SAVE_STEP the last process has
written its weights; then it is killed (FAULT ``kill``), or may write no file above 100 kB (``full``).
"""

import os
import resource
import signal
import sys

from deepseek_cli.main import main
from deepseek_training.trainer import stage_trainer

save = stage_trainer.save_split_optimizer


def fail(model, optimizer, checkpoint):
    if checkpoint.name == f"checkpoint-{os.environ['SAVE_STEP']}" and os.environ["RANK"] == "1":
        if os.environ["FAULT"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save(model, optimizer, checkpoint)


stage_trainer.save_split_optimizer = fail
sys.exit(main(sys.argv[1:]))
