"""How a model's checkpoint names its modules and single experts, where the model in memory has them renamed and fused.

Found by sending marked tensors through transformers' own conversion, which `save_pretrained` uses: a family needs no
table here. Mixtral's experts come out as ``block_sparse_moe.experts.0.w1``, Qwen3-MoE's as
``mlp.experts.0.gate_proj``. `expert_lora` calls it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from modeling_deepseek.families import find_moe_layers

PARTS = ("gate_proj", "up_proj", "down_proj")
_ROWS, _COLUMNS = 2, 3  # of a mark; unequal, so that a transposed one is noticed
_SIZE = _ROWS * _COLUMNS


@dataclass(frozen=True)
class CheckpointNames:
    """Names in a checkpoint, by names in memory.

    Attributes:
        experts: By (experts module, expert, one of `PARTS`).
        modules: Of modules with a weight of two axes. One that the checkpoint stores in another layout is absent.
        shapes: Of those weights, [out, in], and of experts' projections, [E, out, in], by parameter.
    """

    experts: dict[tuple[str, int, str], str]
    modules: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def read_names(model: PreTrainedModel) -> CheckpointNames:
    """Return a model's names.

    Args:
        model: On any device; the meta device is enough.

    Raises:
        ValueError: It has no fused experts, or its checkpoint does not hold experts one by one.
    """
    blocks = _fused_experts(model)
    if not blocks:
        raise ValueError(f"base: got {type(model).__name__}, expected a model with fused experts")
    shapes = {
        f"{block}.{name}": tuple(experts._parameters[name].shape)
        for block, experts in blocks.items()
        for name in ("gate_up_proj", "down_proj")
    }
    weights = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module._parameters.get("weight"), nn.Parameter) and module.weight.dim() == 2
    }
    owners: list[tuple[str, int, str] | str] = list(weights)
    marked = {f"{name}.weight": _mark(place, 1)[0] for place, name in enumerate(owners)}
    for block in blocks:
        count = shapes[f"{block}.down_proj"][0]
        first = len(owners)
        owners += [(block, expert, part) for expert in range(count) for part in PARTS[:2]]
        # [E, 2, rows, columns]: gate above up, as in the fused tensor.
        marked[f"{block}.gate_up_proj"] = _mark(first, 2 * count).view(count, 2 * _ROWS, _COLUMNS)
        first = len(owners)
        owners += [(block, expert, PARTS[2]) for expert in range(count)]
        marked[f"{block}.down_proj"] = _mark(first, count)
    found: dict[tuple[str, int, str] | str, str] = {}
    for key, tensor in revert_weight_conversion(model, marked).items():
        place = int(tensor.flatten()[0]) // _SIZE
        if key.endswith(".weight") and torch.equal(tensor, _mark(place, 1)[0]):
            found[owners[place]] = key.removesuffix(".weight")
    experts = {owner: name for owner, name in found.items() if isinstance(owner, tuple)}
    if len(experts) != sum(isinstance(owner, tuple) for owner in owners):
        kind = model.config.model_type
        raise ValueError(f"base: got {kind}, whose checkpoints do not hold gate, up and down of experts one by one")
    modules = {owner: name for owner, name in found.items() if isinstance(owner, str)}
    return CheckpointNames(experts, modules, {**weights, **shapes})


def _mark(first: int, count: int) -> Tensor:
    """Tensors [count, rows, columns] that no other place has; float64 holds them exactly."""
    numbers = torch.arange(first * _SIZE, (first + count) * _SIZE, dtype=torch.float64)
    return numbers.view(count, _ROWS, _COLUMNS)


def _fused_experts(model: PreTrainedModel) -> dict[str, nn.Module]:
    names = {id(module): name for name, module in model.named_modules()}
    found = [layer.experts for layer in find_moe_layers(model) if layer.experts is not None]
    fused = [experts for experts in found if {"gate_up_proj", "down_proj"} <= set(experts._parameters)]
    return {names[id(experts)]: experts for experts in fused}
