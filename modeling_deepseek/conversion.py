"""Checkpoint names: official per-expert tensors on disk, fused 3-D tensors in memory.

`modeling_deepseek.py` calls `register_conversion` on import, so that it also happens where a checkpoint's own copy of
these files is loaded. Without it, transformers saves a third-party model's fused tensors, and PEFT takes LoRA targets
and adapters of the per-expert names for nothing. `Trainer` resumes by `load_state_dict`, past every mapping: a resumed
stock MoE starts with fresh experts. Hence the hook.
"""

import sys
from typing import Any

import torch
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

_PARTS = ("gate_proj", "up_proj", "down_proj")
# The family whose per-expert names and fusion are ours; DeepSeek-V3's too.
_PATTERN = "qwen2_moe"


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
    # PEFT converts LoRA targets and adapters with per-expert names for the model types of this table. It takes a copy
    # when imported.
    _MODEL_TO_CONVERSION_PATTERN[model_type] = _PATTERN
    peft_module = sys.modules.get("peft.utils.transformers_weight_conversion")
    if peft_module is not None:
        peft_module._MODEL_TO_CONVERSION_PATTERN[model_type] = _PATTERN


def fuse_expert_names(
    experts: torch.nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    *_: Any,
) -> None:
    """Replace per-expert tensors in a state dict by the fused ones that the module holds.

    A hook for `register_load_state_dict_pre_hook`; does nothing where the names are fused already. A shard may hold
    some experts of a layer only: the others stay as the module has them, and with `strict` they are missing.

    Args:
        experts: The experts' module.
        state_dict: Changed in place.
        prefix: Of the module's names, with its dot.
        local_metadata: Not used.
        strict: Whether a tensor that the state dict lacks is an error.
        missing_keys: Extended by what it lacks.
        *_: What else `load_state_dict` hands to its hooks.
    """
    held = {}
    for row in range(experts.num_experts):
        for part in _PARTS:
            name = f"{prefix}{row}.{part}.weight"
            if name in state_dict:
                held[row, part] = state_dict.pop(name)
            elif strict:
                missing_keys.append(name)
    if not held:
        if strict:  # none was expected: load_state_dict itself says what is missing of the fused names
            del missing_keys[-experts.num_experts * len(_PARTS) :]
        return
    for fused, parts in (("gate_up_proj", _PARTS[:2]), ("down_proj", _PARTS[2:])):
        names = [(row, part) for row in range(experts.num_experts) for part in parts]
        if all(name in held for name in names):
            rows = [torch.cat([held[row, part] for part in parts]) for row in range(experts.num_experts)]
            state_dict[prefix + fused] = torch.stack(rows)
        elif any(name in held for name in names):
            state_dict[prefix + fused] = _fill_in(getattr(experts, fused), parts, held)


def _fill_in(current: torch.Tensor, parts: tuple[str, ...], held: dict[tuple[int, str], torch.Tensor]) -> torch.Tensor:
    """A copy of a fused tensor `[E, parts * rows, columns]` with the given experts' parts written into it."""
    filled = current.detach().clone()
    for row in range(len(filled)):
        for part, piece in zip(parts, filled[row].chunk(len(parts)), strict=True):
            if (row, part) in held:
                piece.copy_(held[row, part])
    return filled


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
