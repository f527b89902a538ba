"""4-bit experts on disk as compressed-tensors' ``pack-quantized``: written one by one, read back without decoding.

Stock transformers (with compressed-tensors installed) reads these files and makes the experts dense; `packed_settings`
lets our loading keep them in 4 bits. Both directions are the model's own conversion of its experts, with other
endings: codes and scales are stacked, split and named as the weights are, so that no family is named here.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    revert_weight_conversion,
)

LAYOUT = "pack-quantized"
CT_METHOD = "compressed-tensors"
# How one expert's tensors end, by the buffers of `FourBitWeights`.
_ENDINGS = {"weight_packed": "codes", "weight_scale": "scales"}
_PROJECTION = re.compile(r"experts\.(gate_up|down)_proj$")
_EXPERT = re.compile(r"\.experts\.\d+\.[^.]+\.weight_packed$")


def packed_converters(conversions: Iterable[Any]) -> list[Any]:
    """Return a model's conversions with those of its experts doubled: one for codes, one for scales.

    Args:
        conversions: From transformers' `get_model_conversion_mapping`.
    """
    result = []
    for conversion in conversions:
        match = _PROJECTION.search(conversion.target_patterns[0])
        sources = list(conversion._original_source_patterns)
        if match is None or not _stacks_weights(conversion):
            result.append(conversion)
            continue
        stem = conversion._original_target_patterns[0].removesuffix(match[0])
        for ending, part in _ENDINGS.items():
            names = [source.removesuffix("weight") + ending for source in sources]
            target = f"{stem}experts.four_bit.{match[1]}_{part}"
            result.append(conversion.copy(names, [target], operations=list(conversion.operations)))
    return result


def _stacks_weights(conversion: Any) -> bool:
    """Whether a conversion does nothing but stack single experts' weights."""
    if not isinstance(conversion, WeightConverter):
        return False
    is_stacking = all(isinstance(step, MergeModulelist | Concatenate) for step in conversion.operations)
    return is_stacking and all(source.endswith(".weight") for source in conversion._original_source_patterns)


def save_packed(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model with int4 experts as transformers would, its experts one by one in ``pack-quantized``.

    Args:
        model: With experts in int4, from `quantize_experts(format="int4")` or calibrated.
        folder: Of the checkpoint; ``config.json`` is written last, so that half a checkpoint is none.

    Raises:
        ValueError: The checkpoints of its family do not hold experts one by one.
    """
    settings = vars(model.config)["quantization_config"]
    group_size = settings["group_size"] if isinstance(settings, dict) else settings.group_size
    state = _split_names(model)
    vars(model.config).pop("quantization_config")
    try:
        model.save_pretrained(folder, state_dict=state, save_original_format=False)
    finally:
        model.config.quantization_config = settings
    path = Path(folder, "config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = _ct_settings(model, group_size)
    part = path.with_name("config.json.part")
    part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)


def check_packable_names(model: PreTrainedModel) -> None:
    """Refuse a family whose checkpoints do not hold experts one by one, before anything is computed.

    Args:
        model: With ordinary weights.

    Raises:
        ValueError: Its experts have no names of their own on disk.
    """
    targets = [
        one.target_patterns[0]
        for one in packed_converters(_conversions(model))
        if isinstance(one, WeightConverter) and ".four_bit." in one.target_patterns[0]
    ]
    if {target.rpartition(".")[2] for target in targets} < {"gate_up_codes", "down_codes"}:
        kind = model.config.model_type
        raise ValueError(f"model: got {kind}, whose checkpoints do not hold gate, up and down of experts one by one")


def _conversions(model: PreTrainedModel) -> list[Any]:
    known = getattr(model, "_weight_conversions", None)
    found = get_model_conversion_mapping(model, add_legacy=False) if known is None else known
    return [one for one in found if known is not None or not isinstance(one, PrefixChange)]


def _split_names(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict under a checkpoint's names, with the shape that each packed matrix has when it is read."""
    before = model._weight_conversions if hasattr(model, "_weight_conversions") else None
    model._weight_conversions = packed_converters(_conversions(model))
    try:
        state = revert_weight_conversion(model, model.state_dict())
    finally:
        model._weight_conversions = before
    if any(".four_bit." in name for name in state):
        kind = model.config.model_type
        raise ValueError(f"model: got {kind}, whose checkpoints do not hold gate, up and down of experts one by one")
    for name in [name for name in state if name.endswith(".weight_packed")]:
        rows, words = state[name].shape
        state[name.removesuffix("packed") + "shape"] = torch.tensor([rows, 8 * words])
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _ct_settings(model: PreTrainedModel, group_size: int) -> dict[str, Any]:
    """What compressed-tensors' readers are told: every linear layer is in 4 bits but those that are not."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    routers = {"re:.*\\.(mlp|block_sparse_moe)\\.gate$"}
    ignored = {"re:^" + re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) + "$" for name in linears}
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "quant_method": CT_METHOD,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": sorted(ignored | routers),
    }


def packed_settings(folder: str | Path) -> dict[str, Any] | None:
    """Return by which of our settings a checkpoint's experts stay in 4 bits; None where it is another's business.

    Args:
        folder: Of a checkpoint; another name is none of ours.
    """
    path = Path(folder, "config.json")
    if not path.is_file():
        return None
    found = read_packed_settings(json.loads(path.read_text(encoding="utf-8")).get("quantization_config"))
    if found is None:
        return None
    packed = [name for file in sorted(Path(folder).glob("*.safetensors")) for name in _packed_names(file)]
    return found if packed and all(_EXPERT.search(name) for name in packed) else None


def read_packed_settings(stored: Any) -> dict[str, Any] | None:
    """Return our settings for a checkpoint's `quantization_config`; None where it is another format.

    Args:
        stored: As in ``config.json``.
    """
    if not isinstance(stored, dict) or stored.get("quant_method") != CT_METHOD or stored.get("format") != LAYOUT:
        return None
    groups = stored.get("config_groups")
    weights = next(iter(groups.values())).get("weights") if isinstance(groups, dict) and len(groups) == 1 else None
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    if not isinstance(weights, dict) or any(weights.get(name) != value for name, value in wanted.items()):
        return None
    return {"bits": 4, "format": "int4", "group_size": weights.get("group_size"), "layout": LAYOUT}


def _packed_names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return [name for name in tensors.keys() if name.endswith(".weight_packed")]  # noqa: SIM118
