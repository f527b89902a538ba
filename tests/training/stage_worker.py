"""Runs commands of deepseek-moe one after another, as one process of several or alone.

Started by `test_stages_in_processes`: to start processes is what takes the time. JOBS names a JSON file with a list of
``name``, ``words`` and, where the training shall end in a step, ``stop_at``. What each command returned, and wrote to
stderr, goes into a file beside it, one per process.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch.distributed
from accelerate.state import AcceleratorState
from transformers import Trainer
from transformers.integrations import unset_hf_deepspeed_config

from deepseek_cli.main import main

step, stop_at = Trainer.training_step, None


class Stopped(BaseException):
    """The process is killed here, but for the next command."""


def stopping_step(self, *args, **kwargs):
    if stop_at is not None and self.state.global_step == stop_at - 1:
        raise Stopped
    return step(self, *args, **kwargs)


def run(words):
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except Stopped:
            code = "stopped"
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()  # or the next command would load its model in parts
    return {"code": code, "stderr": told.getvalue()[-3000:]}


Trainer.training_step = stopping_step
torch.distributed.destroy_process_group = lambda *args: None  # the next command needs it
jobs, done = Path(sys.argv[1]), {}
for job in json.loads(jobs.read_text()):
    stop_at = job.get("stop_at")
    done[job["name"]] = run(job["words"])
    jobs.with_suffix(f".{os.environ.get('RANK', '0')}.json").write_text(json.dumps(done))
