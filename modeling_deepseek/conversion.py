"""Checkpoint names: official per-expert tensors on disk, fused 3-D tensors in memory.

`modeling_deepseek.py` calls `register_conversion` on import, so that it also happens where a checkpoint's own copy of
these files is loaded. Surprising: without it, transformers saves a third-party model's fused tensors without a word.
And `Trainer` resumes by `load_state_dict`, past every mapping, so that a resumed stock MoE silently starts with fresh
experts; hence the hook.
"""

from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter


def register_conversion(model_type: str) -> None:
    """Register the mapping between per-expert and fused expert weights.

    Args:
        model_type: The configuration's `model_type`.
    """
    mapping = [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
    # The package and a checkpoint's copy of it may both be imported in one process.
    register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


def fuse_expert_names(experts: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace per-expert tensors in a state dict by the fused ones that the module holds.

    A hook for `register_load_state_dict_pre_hook`; does nothing where the names are fused already.

    Args:
        experts: The experts' module.
        state_dict: Changed in place.
        prefix: Of the module's names, with its dot.
    """
    rows = range(experts.num_experts)
    if f"{prefix}0.gate_proj.weight" not in state_dict:
        return

    def take(name: str) -> torch.Tensor:
        return torch.stack([state_dict.pop(f"{prefix}{row}.{name}.weight") for row in rows])

    state_dict[f"{prefix}gate_up_proj"] = torch.cat([take("gate_proj"), take("up_proj")], dim=1)
    state_dict[f"{prefix}down_proj"] = take("down_proj")


def split_expert_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict with per-expert tensors, the official names, in place of fused ones.

    Args:
        state_dict: Names and tensors; those of other modules stay as they are.
    """
    split = {}
    for name, tensor in state_dict.items():
        prefix, _, last = name.rpartition(".")
        if not prefix.endswith("mlp.experts"):
            split[name] = tensor
            continue
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[last]
        for row, expert in enumerate(tensor):
            for part, piece in zip(parts, expert.chunk(len(parts)), strict=True):
                split[f"{prefix}.{row}.{part}.weight"] = piece.clone()
    return split
