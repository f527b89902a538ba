"""Fewer routed experts in a model of any family of transformers; everything else stays as it is.

`deepseek-moe shrink` calls it for models that are not ours. Nothing is known of a family but where its routers and
experts are (`modeling_deepseek/families.py`): two outlines on the meta device tell which axis of which tensor counts
experts, and a configuration under which anything else would change is refused.
"""

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel

from deepseek_training.compress.expert_saliency import ExpertSaliency
from deepseek_training.compress.selection import ExpertsBy, keep_best
from modeling_deepseek.families import MoeLayer, find_moe_layers


@dataclasses.dataclass(frozen=True)
class StockCut:
    """Which axes lose experts.

    Attributes:
        axes: By a tensor's name, the axis and the layer's place among those with experts.
        num_experts: Before and after.
        obstacles: What stands in the way, in words.
    """

    axes: dict[str, tuple[int, int]]
    num_experts: tuple[int, int]
    obstacles: list[str]


def plan_cut(teacher: PreTrainedModel, student: PreTrainedModel) -> StockCut:
    """Return what distinguishes two models of one family.

    Args:
        teacher: The larger, also on the meta device.
        student: The smaller, likewise.
    """
    layers, fewer = find_moe_layers(teacher), find_moe_layers(student)
    if not layers or any(layer.experts is None or not layer.num_experts for layer in layers):
        return StockCut({}, (0, 0), [f"{teacher.config.model_type}: got no routed experts that can be cut"])
    old, new = {layer.num_experts for layer in layers}, {layer.num_experts for layer in fewer}
    if len(old) > 1 or len(new) > 1 or len(layers) != len(fewer):
        return StockCut({}, (0, 0), ["layers: got different numbers of experts, expected one"])
    before, after = int(old.pop() or 0), int(new.pop() or 0)
    obstacles = _counts(student.config.get_text_config(), before, after)
    owners = {layer.name: place for place, layer in enumerate(layers)}
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    axes = {}
    for name, tensor in teacher.state_dict().items():
        shape = tuple(tensor.shape)
        if shapes.get(name) == shape:
            continue
        place = next((place for owner, place in owners.items() if name.startswith(f"{owner}.")), None)
        axis = _axis(shape, shapes.get(name), before, after)
        if place is None or axis is None:
            obstacles.append(f"{name}: got {shapes.get(name)}, expected the teacher's {shape}")
        else:
            axes[name] = (axis, place)
    obstacles += [f"{name}: got a tensor that the teacher has not" for name in shapes.keys() - teacher.state_dict()]
    return StockCut(axes, (before, after), obstacles[:3] + [f"and {len(obstacles) - 3} more"] * (len(obstacles) > 3))


def _counts(config: Any, before: int, after: int) -> list[str]:
    """What stands in the way of so many experts, whatever the tensors."""
    groups, chosen = getattr(config, "n_group", None) or 1, getattr(config, "num_experts_per_tok", None) or 1
    found = [f"experts: got {after}, expected at most the teacher's {before}"] if after > before else []
    if after % groups:
        found.append(f"experts: got {after}, expected a multiple of n_group={groups}")
    if chosen > after:
        found.append(f"experts: got {after}, expected at least num_experts_per_tok={chosen}")
    return found


def _axis(old: tuple[int, ...], new: tuple[int, ...] | None, before: int, after: int) -> int | None:
    """The one axis along which `before` became `after`; None where there is none, or something else changed."""
    if new is None or len(new) != len(old):
        return None
    changed = [axis for axis, sizes in enumerate(zip(old, new, strict=True)) if sizes[0] != sizes[1]]
    is_of_experts = len(changed) == 1 and (old[changed[0]], new[changed[0]]) == (before, after)
    return changed[0] if is_of_experts else None


@torch.no_grad()
def shrink_experts(
    model: PreTrainedModel, config: Any, blocks: torch.Tensor, *, experts_by: ExpertsBy = "reap", batch_size: int = 8
) -> tuple[PreTrainedModel, list[list[int]]]:
    """Return a model with the experts that matter most, and which they are, layer by layer.

    Args:
        model: Of any family; it stays as it is.
        config: Its configuration with fewer experts.
        blocks: `[blocks, S]` token ids of calibration text.
        experts_by: Which score ranks the experts.
        batch_size: Blocks a forward pass.

    Raises:
        ValueError: Something else than experts would be cut.
    """
    with torch.device("meta"):
        cut = plan_cut(model, type(model)(config))
    if cut.obstacles:
        raise ValueError(f"shrink: this student is not a slice of the teacher: {'; '.join(cut.obstacles)}")
    layers = find_moe_layers(model)
    scores = score_experts(model, layers, blocks, experts_by=experts_by, batch_size=batch_size)
    groups = getattr(config, "n_group", None) or 1
    kept = [keep_best(score, cut.num_experts[1], groups) for score in scores]
    student = type(model)._from_config(config, dtype=model.dtype).eval()
    source = model.state_dict()
    saved = student.state_dict()
    for name, tensor in {**dict(student.named_parameters()), **dict(student.named_buffers())}.items():
        if name in saved:
            axis, place = cut.axes.get(name, (0, -1))
            rows = source[name]
            tensor.copy_(rows if place < 0 else rows.index_select(axis, kept[place].to(rows.device)))
    if model.can_generate():
        student.generation_config = model.generation_config
    return student, [row.tolist() for row in kept]


def score_experts(
    model: PreTrainedModel,
    layers: list[MoeLayer],
    blocks: torch.Tensor,
    *,
    experts_by: ExpertsBy = "reap",
    batch_size: int = 8,
) -> list[torch.Tensor]:
    """Return each layer's scores, `[E]`, on calibration text.

    Args:
        model: Of any family.
        layers: Its layers with experts.
        blocks: `[blocks, S]` token ids.
        experts_by: Which score.
        batch_size: Blocks a forward pass.
    """
    saliencies = [ExpertSaliency(layer, int(layer.num_experts or 0)) for layer in layers]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(blocks), batch_size):
            model(input_ids=blocks[start : start + batch_size].long().to(model.device), use_cache=False)
    finally:
        model.train(was_training)
        for saliency in saliencies:
            saliency.close()
    return [saliency.reap if experts_by == "reap" else saliency.frequency for saliency in saliencies]
