"""The student that a distill recipe asks for: cut out of the teacher, begun anew, or a model that is there."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed

from deepseek_records.loading import is_adapter, load_config, load_model, resolve_checkpoint
from deepseek_training.compress.calibration import calibration_blocks
from deepseek_training.compress.importance import measure_importance
from deepseek_training.compress.selection import ExpertsBy, choose
from deepseek_training.compress.shrink import shrink
from deepseek_training.compress.stock_experts import shrink_experts
from deepseek_training.compress.student_config import is_ours, outline, refuse_obstacles, student_config
from deepseek_training.launch.plan import load_or_outline
from deepseek_training.launch.step_time import MOST_BYTES
from deepseek_training.recipes.distill import DistillRecipe
from modeling_deepseek.four_bit_experts import METHOD

# DeepSeek-V3's; a loaded configuration has it at 0, and a student's experts are about to get other tokens.
_BIAS_SPEED = 0.001


@dataclasses.dataclass(frozen=True)
class PlannedStudent:
    """A student before any weight of the teacher is read.

    Attributes:
        config: Its configuration; None for a model that is there.
        source: That model.
    """

    config: PreTrainedConfig | None
    source: str | None = None


def plan_student(recipe: DistillRecipe) -> PlannedStudent:
    """Return the student's configuration, checked against the teacher's.

    Args:
        recipe: The settings.

    Raises:
        ValueError: It is not a slice of the teacher, or larger than it.
        FileNotFoundError: A model is missing.
    """
    if recipe.start not in ("shrink", "fresh"):
        return PlannedStudent(None, resolve_checkpoint(recipe.start))
    teacher = read_config(recipe.teacher)
    settings = dict(recipe.student)
    if is_ours(teacher):
        settings = {"router_bias_update_speed": _BIAS_SPEED, **settings}
    if recipe.start == "shrink":
        return PlannedStudent(plan_cut_student(teacher, settings))
    config = student_config(teacher, settings)
    refuse_larger(outline(config).num_parameters(), outline(teacher).num_parameters())
    return PlannedStudent(config)


def plan_cut_student(teacher: PreTrainedConfig, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the configuration of a slice, before any weight is read.

    Args:
        teacher: The larger model's.
        settings: What the smaller one has otherwise.

    Raises:
        ValueError: It is not a slice, or larger, or the teacher's experts are in 4 bits.
    """
    quantization = getattr(teacher, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") in (METHOD, "compressed-tensors"):
        raise ValueError("model: got experts in 4 bits, expected ordinary weights to cut; cut first, then quantize")
    config = student_config(teacher, settings)
    refuse_obstacles(teacher, config)
    return config


def read_config(name: str) -> PreTrainedConfig:
    """Return the configuration of a model, of an adapter the whole model's.

    Args:
        name: As for `load_model`.
    """
    source = resolve_checkpoint(name)
    if is_adapter(source) or not Path(source).is_dir():
        return load_model(name).config
    return load_config(source)


def refuse_larger(student: int, teacher: int) -> None:
    """Raise a one-line ValueError if a student has more parameters than its teacher."""
    if student > teacher:
        raise ValueError(f"student: got {student:,} parameters, expected at most the teacher's {teacher:,}")


def make_student(
    recipe: DistillRecipe, planned: PlannedStudent, teacher: PreTrainedModel, blocks: torch.Tensor, *, is_dry: bool
) -> PreTrainedModel:
    """Return the student; for a dry run of the two starts that make one, its shapes and first weights only.

    Args:
        recipe: The settings.
        planned: From `plan_student`.
        teacher: Stays as it is.
        blocks: `[blocks, S]` to train on; the first of them tell what matters.
        is_dry: Whether nothing but the plan is wanted.

    Raises:
        ValueError: The calibration text is too short, or the student larger than its teacher.
    """
    config = planned.config
    if config is None:
        student = load_or_outline(str(planned.source), is_dry=is_dry)
        refuse_larger(student.num_parameters(), teacher.num_parameters())
        return student
    calibration = None
    if recipe.start == "shrink":
        calibration = calibration_blocks(blocks, recipe.calibration_tokens, teacher.config)
    set_seed(recipe.seed)
    if calibration is None or is_dry:
        shapes = outline(config)
        if is_dry and sum(one.numel() * one.element_size() for one in shapes.parameters()) > MOST_BYTES:
            return shapes
        return AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
    return cut_student(teacher, config, calibration, experts_by=recipe.experts_by, batch_size=recipe.batch_size)[0]


def cut_student(
    teacher: PreTrainedModel,
    config: PreTrainedConfig,
    calibration: torch.Tensor,
    *,
    experts_by: ExpertsBy = "reap",
    batch_size: int = 8,
) -> tuple[Any, list[list[int]]]:
    """Return a slice of a model, and the experts it keeps by layer: of ours along every axis, of others fewer experts.

    Args:
        teacher: Stays as it is.
        config: The student's.
        calibration: `[blocks, S]` that tell what matters.
        experts_by: Which score ranks the experts.
        batch_size: Blocks a forward pass.
    """
    if not is_ours(config):
        return shrink_experts(teacher, config, calibration, experts_by=experts_by, batch_size=batch_size)
    importance = measure_importance(teacher, calibration, batch_size=batch_size)
    kept = choose(importance, teacher.config, config, experts_by=experts_by)
    experts = [layer.experts.tolist() for layer in kept.layers if layer.experts is not None]
    return shrink(teacher, config, importance, experts_by=experts_by), experts
