"""The configuration of a smaller model, and what keeps it from being a slice of a larger one.

`shrink` and `distill` ask before a weight is read. A slice keeps some of the teacher's experts, channels, heads and
layers; what computes otherwise, or is larger, is not a slice of it.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deepseek_records.nearest_name import did_you_mean
from deepseek_training.compress.stock_experts import plan_cut
from modeling_deepseek import DeepseekConfig

# Of a model of ours: what a slice may have less of.
CUT = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_attention_heads",
    "num_key_value_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "topk_group",
    "max_position_embeddings",
)
# What changes no weight and nothing that a finished model computes, or only the number of experts per token.
_FREE = {
    "architectures",
    "attention_dropout",
    "auto_map",
    "dtype",
    "expert_top_p",
    "hidden_dropout",
    "initializer_range",
    "min_experts_per_tok",
    "mtp_loss_coef",
    "num_nextn_predict_layers",
    "router_aux_loss_coef",
    "router_bias_update_speed",
    "router_z_loss_coef",
    "seq_aux_loss_coef",
    "target_experts_per_tok",
    "transformers_version",
    "use_cache",
}
_DYNAMIC = ("min_experts_per_tok", "num_experts_per_tok")


def is_ours(config: PreTrainedConfig) -> bool:
    """Tell whether a configuration is of this package's model, of which more than experts can be cut."""
    return config.model_type == DeepseekConfig.model_type


def student_config(teacher: PreTrainedConfig, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the teacher's configuration with some settings replaced.

    A student that is cut has no prediction layers unless it is asked for.

    Args:
        teacher: The configuration, which stays as it is.
        settings: What is otherwise.

    Raises:
        ValueError: An unknown setting, or a value that is refused.
    """
    known = set(teacher.to_dict()) | set(teacher.attribute_map)
    for key in settings.keys() - known:
        raise ValueError(f"{key}: no such setting of {teacher.model_type}{did_you_mean(key, known)}")
    values = dict(settings)
    if is_ours(teacher):
        values = {**_following(teacher, settings), **values}
    config = copy.deepcopy(teacher)
    try:
        for key, value in values.items():
            setattr(config, key, value)
        if is_ours(teacher) and not is_uncut(teacher, config):
            config.num_nextn_predict_layers = settings.get("num_nextn_predict_layers", 0)
            config.mtp_loss_coef = settings.get("mtp_loss_coef", 0.0)
        if isinstance(config, DeepseekConfig):
            config.check()
        elif hasattr(config, "validate"):
            config.validate()
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return config


def _following(teacher: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What goes with other settings unless it is set itself."""
    values: dict[str, Any] = {}
    if teacher.num_key_value_heads == teacher.num_attention_heads and "num_attention_heads" in settings:
        values["num_key_value_heads"] = settings["num_attention_heads"]
    if settings.keys() & set(_DYNAMIC):
        values["target_experts_per_tok"] = None  # it belongs to the teacher's bounds
    return values


def refuse_obstacles(teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Raise a one-line ValueError that names all that keeps a student from being a slice of a teacher.

    Args:
        teacher: The larger model's configuration.
        student: The smaller one's.
    """
    obstacles = obstacles_to_shrink(teacher, student)
    if obstacles:
        raise ValueError(f"shrink: this student is not a slice of the teacher: {'; '.join(obstacles)}")


def obstacles_to_shrink(teacher: PreTrainedConfig, student: PreTrainedConfig) -> list[str]:
    """Return what keeps a student from being a slice of a teacher, in words; nothing where nothing does.

    No weight is read: models of other families than ours are compared on the meta device.

    Args:
        teacher: The larger model's configuration.
        student: The smaller one's.
    """
    if student.model_type != teacher.model_type:
        return [f"model_type: got {student.model_type}, expected the teacher's {teacher.model_type}"]
    if not is_ours(teacher):
        return _stock_obstacles(teacher, student)
    old, new = teacher.to_dict(), student.to_dict()
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before == after or name in _FREE or name.startswith("_"):
            continue
        if name not in CUT:
            found.append(f"{name}: got {after}, expected the teacher's {before}")
        elif before is None or after is None:
            found.append(f"{name}: got {after}, expected a number like the teacher's {before}; a norm lies between")
        elif after > before:
            found.append(f"{name}: got {after}, expected at most the teacher's {before}")
    kinds = zip(("dense", "expert"), _layer_counts(teacher), _layer_counts(student), strict=True)
    for kind, before, after in kinds:
        if after > before and not any(text.startswith("num_hidden_layers") for text in found):
            found.append(f"num_hidden_layers: got {after} {kind} layers, expected at most the teacher's {before}")
    if student.num_mtp_modules and not is_uncut(teacher, student):
        found.append(f"mtp_loss_coef: got {student.mtp_loss_coef}, expected 0; prediction layers are not cut")
    return found


def is_uncut(teacher: Any, student: Any) -> bool:
    """Tell whether a student of ours has all that its teacher has."""
    return all(getattr(teacher, name) == getattr(student, name) for name in CUT if name != "max_position_embeddings")


def _layer_counts(config: Any) -> tuple[int, int]:
    """Layers without and with routed experts."""
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    return dense, config.num_hidden_layers - dense


def _stock_obstacles(teacher: PreTrainedConfig, student: PreTrainedConfig) -> list[str]:
    """Of another family: only tensors of routers and experts may be smaller, along the axis of the experts."""
    try:
        return plan_cut(outline(teacher), outline(student)).obstacles
    except (ValueError, RuntimeError, AttributeError) as error:
        return [" ".join(str(error).split())]


def outline(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model's shapes without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def describe_cut(teacher: PreTrainedConfig, student: PreTrainedConfig) -> str:
    """Return in one line what a student has less of.

    Args:
        teacher: The larger model's configuration.
        student: The smaller one's.
    """
    old, new = teacher.to_dict(), student.to_dict()
    changed = [name for name in old if name not in _FREE and not name.startswith("_") and old[name] != new.get(name)]
    sizes = [outline(config).num_parameters() for config in (teacher, student)]
    what = ", ".join(f"{name} {old[name]} -> {new[name]}" for name in changed) or "nothing is cut"
    return f"{sizes[0]:,} -> {sizes[1]:,} parameters ({sizes[1] / sizes[0]:.1%}): {what}"
