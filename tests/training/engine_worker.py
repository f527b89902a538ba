"""Runs ``deepseek-moe pretrain`` as one process of several and writes down which engine trained the model.

Started by `test_distributed` through ``accelerate launch`` or torchrun. With STOP_AT in the environment the process
ends without a word in the middle of that step.
"""

import json
import os
import sys

import torch
import torch.distributed
from moe_routers import find_routers

from deepseek_cli.main import main
from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.stages import pretrain
from deepseek_training.trainer import stage_trainer


def describe(trainer):
    model, state = trainer.model_wrapped, trainer.accelerator.state
    moe = next(module for module in model.modules() if type(module).__name__ == "DeepseekMoE")
    balance = next(one for one in trainer.callback_handler.callbacks if isinstance(one, ExpertBalanceCallback))
    biases = [router.e_score_correction_bias.tolist() for router in find_routers(model)]
    return {
        "engine": state.distributed_type.value,
        "num_processes": state.num_processes,
        "backend": torch.distributed.get_backend(),
        "wrapper": type(model).__name__,
        "parameters": sorted({type(parameter.data).__name__ for parameter in model.parameters()}),
        "is_partitioned": all(hasattr(parameter, "ds_id") for parameter in model.parameters()),
        "is_leaf": getattr(moe, "_z3_leaf", False),
        "num_local_experts": moe.experts.num_experts,
        "biases": biases,
        "counts": [torch.as_tensor(counts).tolist() for counts in balance.tokens_per_expert],
    }


def train_and_describe(trainer, run, *arguments):
    train(trainer, run, *arguments)
    (run.path / f"rank{trainer.args.process_index}.json").write_text(json.dumps(describe(trainer)))


class StoppingTrainer(stage_trainer.StageTrainer):
    """Ends its process before the backward pass of a step."""

    def compute_loss(self, *args, **kwargs):
        if self.model.training and self.state.global_step == int(os.environ["STOP_AT"]) - 1:
            os._exit(9)
        return super().compute_loss(*args, **kwargs)


train = pretrain.run_training
pretrain.run_training = train_and_describe
if "STOP_AT" in os.environ:
    pretrain.StageTrainer = StoppingTrainer
sys.exit(main(sys.argv[1:]))
