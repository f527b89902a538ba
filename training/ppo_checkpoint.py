"""Checkpoints of PPO: the parts that TRL leaves out, and the way back.

A folder ``checkpoint-N`` holds the policy (or its adapter), optimizer, schedule and trainer state as `Trainer` writes
them, and beside them ``value_model/`` and ``ppo_state.json`` with the reward's state. Surprising: the latter is
written last and by a rename, so a folder without it was cut short and is passed over.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from trl.experimental.ppo.ppo_trainer import OnlineTrainerState

if TYPE_CHECKING:
    from deepseek_training.ppo_trainer import CorrectedPPOTrainer

VALUE_FOLDER = "value_model"
STATE_FILE = "ppo_state.json"


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint in a folder, or None."""
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{STATE_FILE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def save_training_state(trainer: "CorrectedPPOTrainer") -> None:
    """Add value model and reward state to the checkpoint `Trainer` has just written."""
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if trainer.accelerator.is_main_process:
        trainer.value_model.save_pretrained(folder / VALUE_FOLDER)
        reward = _stateful(trainer)
        state = {"reward": reward.state_dict() if reward is not None else None}
        temporary = folder / (STATE_FILE + ".partial")
        temporary.write_text(json.dumps(state), encoding="utf-8")
        os.replace(temporary, folder / STATE_FILE)
    trainer.accelerator.wait_for_everyone()


def load_checkpoint(trainer: "CorrectedPPOTrainer", folder: str | Path) -> None:
    """Bring a fresh trainer to the state of a checkpoint.

    Raises:
        FileNotFoundError: The folder is no whole checkpoint of PPO.
    """
    folder = Path(folder)
    if not (folder / STATE_FILE).is_file():
        raise FileNotFoundError(f"resume_from_checkpoint: {folder} is no whole PPO checkpoint (no {STATE_FILE})")
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    _load_weights(unwrapped.policy, folder)
    _load_weights(unwrapped.value_model, folder / VALUE_FOLDER)
    device = trainer.accelerator.device
    trainer.optimizer.load_state_dict(torch.load(folder / OPTIMIZER_NAME, map_location=device, weights_only=True))
    trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
    state = OnlineTrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    for name in ("global_step", "episode", "epoch", "log_history"):
        setattr(trainer.state, name, getattr(state, name))
    reward_state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["reward"]
    if reward_state is not None:
        _stateful(trainer).load_state_dict(reward_state)


def _stateful(trainer: "CorrectedPPOTrainer") -> Any:
    """The reward, if it keeps a state."""
    reward = vars(trainer.reward_model).get("reward")
    return reward if hasattr(reward, "state_dict") and not isinstance(reward, nn.Module) else None


def _load_weights(model: nn.Module, folder: Path) -> None:
    """Copy a saved model's weights and buffers in; through `from_pretrained`, which knows the names on disk."""
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
        return
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
