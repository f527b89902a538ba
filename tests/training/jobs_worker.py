"""Runs commands of deepseek-moe one after another, as one process of several or alone.

Started by `process_jobs`: to start processes is what takes the time. The argument names a JSON file with a list of
``name``, ``words`` and, where the training shall end in a step or after its last (``end``), ``stop_at``; with
``leave`` the process then ends without a word. What each command returned and wrote, and which engine trained its
model, goes into a file beside it, one per process.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed
from accelerate.state import AcceleratorState, GradientState
from moe_routers import find_routers
from transformers import Trainer
from transformers.integrations import unset_hf_deepspeed_config

from deepseek_cli.main import main
from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.ppo.trainer import CorrectedPPOTrainer

step, train, update = Trainer.training_step, Trainer.train, CorrectedPPOTrainer._train_step
job, trained = {}, {}


class Stopped(BaseException):
    """The process is killed here, but for the next command."""


def stopping_step(self, *args, **kwargs):
    if self.state.global_step + 1 == job.get("stop_at"):
        if job.get("leave"):
            os._exit(9)
        raise Stopped
    return step(self, *args, **kwargs)


def stopping_update(self, number):
    if number == job.get("stop_at"):
        raise Stopped
    update(self, number)


def describing_train(self, *args, **kwargs):
    result = train(self, *args, **kwargs)
    trained.update(describe(self))
    if job.get("stop_at") == "end":
        raise Stopped
    return result


def describe(trainer):
    model, state = trainer.model_wrapped, trainer.accelerator.state
    moe = next((module for module in model.modules() if type(module).__name__ == "DeepseekMoE"), None)
    callbacks = trainer.callback_handler.callbacks
    balance = next((one for one in callbacks if isinstance(one, ExpertBalanceCallback)), None)
    return {
        "engine": state.distributed_type.value,
        "num_processes": state.num_processes,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "wrapper": type(model).__name__,
        "parameters": sorted({type(parameter.data).__name__ for parameter in model.parameters()}),
        "is_partitioned": all(hasattr(parameter, "ds_id") for parameter in model.parameters()),
        "is_leaf": getattr(moe, "_z3_leaf", False),
        "num_local_experts": moe and moe.experts.num_experts,
        "biases": [router.e_score_correction_bias.tolist() for router in find_routers(model)],
        "counts": balance and [torch.as_tensor(counts).tolist() for counts in balance.tokens_per_expert],
    }


def run(words):
    trained.clear()
    told, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(printed):
        try:
            code = main(words)
        except Stopped:
            code = "stopped"
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()  # it still waits for the rest of the step that was stopped
    unset_hf_deepspeed_config()  # or the next command would load its model in parts
    return {"code": code, "stderr": told.getvalue()[-3000:], "stdout": printed.getvalue(), "trained": dict(trained)}


Trainer.training_step, Trainer.train = stopping_step, describing_train
CorrectedPPOTrainer._train_step = stopping_update
torch.distributed.destroy_process_group = lambda *args: None  # the next command needs it
jobs, done = Path(sys.argv[1]), {}
for job in json.loads(jobs.read_text()):
    done[job["name"]] = run(job["words"])
    jobs.with_suffix(f".{os.environ.get('RANK', '0')}.json").write_text(json.dumps(done))
