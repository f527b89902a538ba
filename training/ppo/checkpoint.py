"""Checkpoints of PPO: the parts that TRL leaves out, and the way back.

A folder ``checkpoint-N`` holds the policy (or its adapter), optimizer, schedule and trainer state as `Trainer` writes
them, and beside them ``value_model/`` (or its adapter and head), ``reference/`` unless it is the policy without its
adapter, and ``ppo_state.json`` with the reward's state in each process. The reference never changes, so that only a
training's first checkpoint writes it and the others link to the same files. Surprising: the list of files that makes
a checkpoint complete (see `trainer/checkpoints.py`) is written last, so a folder whose writing was cut short is
passed over, and older checkpoints are deleted only after that.
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from trl.experimental.ppo.ppo_trainer import OnlineTrainerState

from deepseek_records.run_folder import write_json
from deepseek_training.trainer.checkpoints import is_complete, load_weights, mark_complete, step_of

if TYPE_CHECKING:
    from deepseek_training.ppo.trainer import CorrectedPPOTrainer

VALUE_FOLDER = "value_model"
REFERENCE_FOLDER = "reference"
STATE_FILE = "ppo_state.json"


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint in a folder, or None."""
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{STATE_FILE}") if is_complete(path.parent)]
    return max(found, key=step_of, default=None)


def finish_checkpoint(trainer: "CorrectedPPOTrainer") -> None:
    """Add value model and reward state to the checkpoint `Trainer` has just written, and mark it as whole.

    Args:
        trainer: Whose checkpoint it is.
    """
    args = trainer.args
    folder = Path(args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    states = gather_object([reward_state(trainer)])
    trainer.accelerator.wait_for_everyone()  # every process writes its random state into the checkpoint
    if trainer.accelerator.is_main_process:
        trainer.value_model.save_pretrained(folder / VALUE_FOLDER)
        _save_reference(trainer, folder / REFERENCE_FOLDER)
        write_json(folder / STATE_FILE, {"reward": states})
        mark_complete(folder)
        rotate_checkpoints(args.output_dir, args.save_total_limit, trainer.state.best_model_checkpoint)
    trainer.accelerator.wait_for_everyone()


def load_checkpoint(trainer: "CorrectedPPOTrainer", folder: str | Path) -> None:
    """Bring a fresh trainer to the state of a checkpoint.

    Args:
        trainer: Built with the same settings.
        folder: The checkpoint.

    Raises:
        FileNotFoundError: The folder is no whole checkpoint of PPO.
        ValueError: Another number of processes wrote it, or it holds weights only.
    """
    folder, accelerator = Path(folder), trainer.accelerator
    if not (folder / STATE_FILE).is_file() or not is_complete(folder):
        raise FileNotFoundError(f"resume_from_checkpoint: {folder} is no whole PPO checkpoint")
    reward_states = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["reward"]
    if len(reward_states) != accelerator.num_processes:
        raise ValueError(
            f"resume_from_checkpoint: {folder} was written by {len(reward_states)} processes, "
            f"this training has {accelerator.num_processes}"
        )
    if not (folder / OPTIMIZER_NAME).is_file():
        raise ValueError(f"resume_from_checkpoint: {folder} has no optimizer state (save_only_model=True)")
    unwrapped = accelerator.unwrap_model(trainer.model)
    _load_weights(unwrapped.policy, folder)
    _load_weights(unwrapped.value_model, folder / VALUE_FOLDER)
    if trainer.ref_model is not None:
        _load_weights(accelerator.unwrap_model(trainer.ref_model), folder / REFERENCE_FOLDER)
        trainer.saved_reference = folder / REFERENCE_FOLDER
    trainer.optimizer.load_state_dict(torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True))
    trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
    state = OnlineTrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    for name in ("global_step", "episode", "epoch", "log_history"):
        setattr(trainer.state, name, getattr(state, name))
    load_reward_state(trainer, reward_states[accelerator.process_index])


def reward_state(trainer: "CorrectedPPOTrainer") -> Any:
    """Return the state of this process's reward, or None if it keeps none.

    Args:
        trainer: Whose reward.
    """
    reward = _stateful(trainer)
    return None if reward is None else reward.state_dict()


def load_reward_state(trainer: "CorrectedPPOTrainer", state: Any) -> None:
    """Restore what `reward_state` returned.

    Args:
        trainer: Whose reward.
        state: The state; None changes nothing.
    """
    if state is not None:
        _stateful(trainer).load_state_dict(state)


def _save_reference(trainer: "CorrectedPPOTrainer", folder: Path) -> None:
    if trainer.ref_model is None or trainer.saved_reference == folder:
        return
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while it wrote this checkpoint
    if trainer.saved_reference is not None and trainer.saved_reference.is_dir():
        shutil.copytree(trainer.saved_reference, folder, copy_function=_link)
    else:
        trainer.accelerator.unwrap_model(trainer.ref_model).save_pretrained(folder)
    trainer.saved_reference = folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _stateful(trainer: "CorrectedPPOTrainer") -> Any:
    """The reward, if it keeps a state."""
    reward = vars(trainer.reward_model).get("reward")
    return reward if hasattr(reward, "state_dict") and not isinstance(reward, nn.Module) else None


def _load_weights(model: nn.Module, folder: Path) -> None:
    """Copy a saved model's weights in, or with LoRA those of its adapter."""
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
        return
    load_weights(model, folder)
