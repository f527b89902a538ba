"""Checkpoint names: official per-expert tensors on disk, fused 3-D tensors in memory.

`modeling_deepseek.py` calls `register_conversion` on import, so that it also happens where a checkpoint's own copy of
these files is loaded. Surprising: without it, transformers saves a third-party model's fused tensors without a word.
"""

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
