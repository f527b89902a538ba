"""Checkpoints of PPO: the parts that TRL leaves out, and the way back.

A folder ``checkpoint-N`` holds the policy (or its adapter), optimizer, schedule and trainer state as `Trainer` writes
them. Beside them lie ``value_model/`` (or its adapter and head), ``reference/`` unless it is the policy without its
adapter, and ``ppo_state.json`` with the reward's state in each process. The reference never changes, so only a
training's first checkpoint writes it and the others link to the same files. The list of files that makes a checkpoint
complete (`trainer/checkpoints.py`) is written last, so a folder whose writing was cut short is passed over. Older
checkpoints are deleted only after that.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from deepseek_records.run_folder import write_json
from deepseek_training.ppo.reward_adapter import load_reward_state, reward_state
from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.trainer.checkpoints import is_complete, load_weights, mark_complete, step_of
from deepseek_training.trainer.distributed_engine import building_as_configured
from deepseek_training.trainer.whole_weights import whole_weights

VALUE_FOLDER = "value_model"
REFERENCE_FOLDER = "reference"
STATE_FILE = "ppo_state.json"
# What a checkpoint has of the optimizer, by what trained.
OPTIMIZER_FILES = {"torchrun": OPTIMIZER_NAME, "DeepSpeed": "latest"}


@dataclasses.dataclass
class PPOState(TrainerState):
    """`Trainer`'s state, and how many completions were learned from.

    Attributes:
        episode: Completions so far, in all processes.
    """

    episode: int = 0


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint in a folder, or None."""
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{STATE_FILE}") if is_complete(path.parent)]
    return max(found, key=step_of, default=None)


class PPOCheckpoints:
    """Writes and reads what a PPO training needs beside `Trainer`'s own checkpoint.

    Args:
        args: TRL's settings; they name the folder and how many checkpoints are kept.
        accelerator: Knows the processes.
        model: Policy and value model, wrapped by the accelerator.
        ref_model: The reference; None where it is the policy without its adapter.
        reward_model: Whose state is kept.
    """

    def __init__(
        self,
        args: PPOConfig,
        accelerator: Accelerator,
        *,
        model: nn.Module,
        ref_model: nn.Module | None,
        reward_model: nn.Module,
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.model = model
        self.ref_model = ref_model
        self.reward_model = reward_model
        self._saved_reference: Path | None = None

    def finish(self, state: TrainerState) -> None:
        """Add value model and reward state to the checkpoint `Trainer` has just written, and mark it as whole.

        Args:
            state: The trainer's; it knows the step.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{state.global_step}"
        states = gather_object([reward_state(self.reward_model)])
        self.accelerator.wait_for_everyone()  # every process writes its random state into the checkpoint
        with whole_weights(self.model, self.accelerator):
            if self.accelerator.is_main_process:
                self.accelerator.unwrap_model(self.model).value_model.save_pretrained(folder / VALUE_FOLDER)
        if self.accelerator.is_main_process:
            self._save_reference(folder / REFERENCE_FOLDER)
            write_json(folder / STATE_FILE, {"reward": states})
            mark_complete(folder)
            rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def load(
        self,
        folder: str | Path,
        state: TrainerState,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        """Bring a fresh training to the state of a checkpoint.

        Args:
            folder: The checkpoint.
            state: The trainer's; its counters and log are set.
            optimizer: Of policy and value model.
            lr_scheduler: Of the optimizer.

        Raises:
            FileNotFoundError: The folder is not a whole checkpoint of PPO.
            ValueError: Another number of processes wrote it, or it holds weights only.
        """
        folder = Path(folder)
        reward_states = self._check(folder)
        if self._is_deepspeed:
            self.model.load_checkpoint(str(folder))
        else:
            unwrapped = self.accelerator.unwrap_model(self.model)
            _load_weights(unwrapped.policy, folder)
            _load_weights(unwrapped.value_model, folder / VALUE_FOLDER)
            optimizer.load_state_dict(torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True))
        if self.ref_model is not None:
            with building_as_configured(self.args):
                _load_weights(self.accelerator.unwrap_model(self.ref_model), folder / REFERENCE_FOLDER)
            self._saved_reference = folder / REFERENCE_FOLDER
        lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        saved = PPOState.load_from_json(str(folder / TRAINER_STATE_NAME))
        for name in ("global_step", "episode", "epoch", "log_history"):
            setattr(state, name, getattr(saved, name))
        load_reward_state(self.reward_model, reward_states[self.accelerator.process_index])

    def _check(self, folder: Path) -> list[Any]:
        """Return the reward's states in a checkpoint that this training can go on from."""
        if not (folder / STATE_FILE).is_file() or not is_complete(folder):
            raise FileNotFoundError(f"resume_from_checkpoint: got {folder}, expected a whole PPO checkpoint")
        states = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["reward"]
        if len(states) != self.accelerator.num_processes:
            raise ValueError(
                f"resume_from_checkpoint: got {folder} of {len(states)} processes, expected one of "
                f"{self.accelerator.num_processes}, as in this training"
            )
        engine, other = ("DeepSpeed", "torchrun") if self._is_deepspeed else ("torchrun", "DeepSpeed")
        if (folder / OPTIMIZER_FILES[other]).is_file():
            raise ValueError(f"engine: got {engine}, expected {other}, which wrote {folder}")
        if not (folder / OPTIMIZER_FILES[engine]).is_file():
            raise ValueError(
                f"resume_from_checkpoint: got {folder} without optimizer state (save_only_model=True), "
                "expected one with it"
            )
        return states

    @property
    def _is_deepspeed(self) -> bool:
        return self.accelerator.state.deepspeed_plugin is not None

    def _save_reference(self, folder: Path) -> None:
        if self.ref_model is None or self._saved_reference == folder:
            return
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while it wrote this checkpoint
        if self._saved_reference is not None and self._saved_reference.is_dir():
            shutil.copytree(self._saved_reference, folder, copy_function=_link)
        else:
            self.accelerator.unwrap_model(self.ref_model).save_pretrained(folder)
        self._saved_reference = folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _load_weights(model: nn.Module, folder: Path) -> None:
    """Copy a saved model's weights in, or with LoRA those of its adapter."""
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
        return
    load_weights(model, folder)
