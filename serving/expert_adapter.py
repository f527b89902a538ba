"""Adapters of fused experts as two-dimensional LoRA of single experts, which other engines read, and back.

PEFT keeps one A `[E * r, N]` and one B `[M, r * E]` for all experts of a layer, the expert fastest in B. Engines that
know experts one by one want ``experts.7.gate_proj.lora_A.weight`` `[r, N]` and ``lora_B`` `[M, r]`. Gate and up have
an A each there: the fused one, twice. Everything else in the adapter is copied. The names follow PEFT for models whose
experts are modules of their own, as in Qwen3-MoE's checkpoints; `expert_lora` gives the names of each family's. No
other engine was run on them here.

E experts, r rank, N inputs, M outputs.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_records.json_files import read_object
from deepseek_serving.checkpoint_names import PARTS as PROJECTIONS
from deepseek_serving.checkpoint_names import CheckpointNames

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # PEFT's, before the names of the model
_FUSED = re.compile(r"^(?P<block>.*\.experts)\.(?P<nest>base_layer\.)?lora_(?P<part>[AB])\.weight$")
_SINGLE = re.compile(
    rf"^(?P<block>.*\.experts)\.(?P<expert>\d+)\.(?P<name>{'|'.join(PROJECTIONS)})\.lora_(?P<part>[AB])\.weight$"
)


def split_experts(source: str | Path, output: str | Path, names: CheckpointNames | None = None) -> Path:
    """Write an adapter whose experts are adapted one by one.

    Args:
        source: A folder as PEFT writes it, with both projections of the experts adapted (`target_parameters`).
        output: The folder to write, empty or absent.
        names: Of the base model's checkpoint; None: Qwen3-MoE's and DeepSeek-V3's.

    Raises:
        ValueError: It adapts no fused experts, or one projection only, or the rank does not fit its tensors.
    """
    config, tensors = _read(source)
    blocks: dict[str, dict[tuple[bool, str], Tensor]] = defaultdict(dict)
    result = {}
    for name, tensor in tensors.items():
        match = _FUSED.match(name)
        if match is None:
            result[name] = tensor
        else:
            blocks[match["block"]][bool(match["nest"]), match["part"]] = tensor
    if not blocks:
        raise ValueError(f"adapter: got {source} without fused experts, expected target_parameters on experts")
    for block, parts in blocks.items():
        if len(parts) != 4:
            raise ValueError(f"adapter: got {len(parts)} tensors for {block}, expected A and B of both projections")
        pairs = [(parts[nest, "A"], parts[nest, "B"]) for nest in (True, False)]
        if not _is_gate_up(*pairs):
            pairs.reverse()
        if not _is_gate_up(*pairs):
            shapes = [tuple(tensor.shape) for pair in pairs for tensor in pair]
            raise ValueError(f"adapter: got shapes {shapes} for {block}, expected gate and up as one, and down")
        (gate_up_a, gate_up_b), (down_a, down_b) = (_by_expert(*pair, config["r"], block) for pair in pairs)
        width = gate_up_b.shape[1] // 2
        for expert in range(gate_up_a.shape[0]):
            for name, a, b in (
                ("gate_proj", gate_up_a[expert], gate_up_b[expert, :width]),
                ("up_proj", gate_up_a[expert], gate_up_b[expert, width:]),
                ("down_proj", down_a[expert], down_b[expert]),
            ):
                result[f"{block}.{expert}.{name}.lora_A.weight"] = a
                result[f"{block}.{expert}.{name}.lora_B.weight"] = b
    if names is not None:
        result = {_in_checkpoint(key, names): tensor for key, tensor in result.items()}
    config["target_modules"] = sorted(_adapted(result))
    config["target_parameters"] = None
    return _write(output, config, result)


def _adapted(tensors: dict[str, Tensor]) -> set[str]:
    """The last parts of the adapted modules' names."""
    return {key.split(".lora_")[0].rpartition(".")[2] for key in tensors if ".lora_" in key}


def _in_checkpoint(key: str, names: CheckpointNames) -> str:
    """An adapter's key with the checkpoint's name of what it adapts."""
    path, mark, rest = key.removeprefix(PREFIX).partition(".lora_")
    if not mark:  # a module that is saved whole
        path, mark, rest = path.rpartition(".")
    block, _, part = path.rpartition(".")
    block, _, expert = block.rpartition(".")
    name = (names.experts.get((block, int(expert), part)) if expert.isdigit() else None) or names.modules.get(path)
    if name is None:
        raise ValueError(f"adapter: got {path}, which the base model lacks or stores in another layout")
    return f"{PREFIX}{name}{mark}{rest}"


def join_experts(source: str | Path, output: str | Path, names: CheckpointNames | None = None) -> Path:
    """Write an adapter of fused experts, as PEFT reads it for such a model.

    Where gate and up of an expert have different A, the fused one holds both, at twice the rank for both projections.

    Args:
        source: A folder with adapters of single experts.
        output: The folder to write, empty or absent.
        names: Of the base model's checkpoint; None: Qwen3-MoE's and DeepSeek-V3's.

    Raises:
        ValueError: It adapts no single experts, or not all of them alike.
    """
    config, tensors = _read(source)
    if names is not None:
        in_memory = _memory_names(names)
        tensors = {_in_memory(key, in_memory): tensor for key, tensor in tensors.items()}
    blocks: dict[str, dict[tuple[int, str, str], Tensor]] = defaultdict(dict)
    result = {}
    for name, tensor in tensors.items():
        match = _SINGLE.match(name)
        if match is None:
            result[name] = tensor
        else:
            blocks[match["block"]][int(match["expert"]), match["name"], match["part"]] = tensor
    if not blocks:
        raise ValueError(f"adapter: got {source} without single experts, expected experts.0.gate_proj.lora_A.weight")
    is_shared = True
    for block, parts in blocks.items():
        num_experts = len({expert for expert, _, _ in parts})
        if len(parts) != 6 * num_experts or max(expert for expert, _, _ in parts) != num_experts - 1:
            raise ValueError(f"adapter: got {len(parts)} tensors for {block}, expected 6 for each of its experts")
        gates = ((parts[e, "gate_proj", "A"], parts[e, "up_proj", "A"]) for e in range(num_experts))
        is_shared = is_shared and all(torch.equal(gate, up) for gate, up in gates)
    for block, parts in blocks.items():
        num_experts = len({expert for expert, _, _ in parts})
        fused = [_fuse(parts, expert, is_shared) for expert in range(num_experts)]
        for place, nest in ((0, "base_layer."), (2, "")):
            a, b = (torch.stack([one[place + i] for one in fused]) for i in range(2))
            result[f"{block}.{nest}lora_A.weight"] = a.flatten(0, 1)
            result[f"{block}.{nest}lora_B.weight"] = b.permute(1, 2, 0).flatten(1)
    parents = {".".join(block.split(".")[-2:]) for block in blocks}
    adapted = {key.split(".lora_")[0].rpartition(".")[2] for key in result if ".lora_" in key} - {
        "experts",
        "base_layer",
    }
    if adapted & set(PROJECTIONS):  # PEFT would take the name for the experts'
        raise ValueError(
            f"adapter: got {min(adapted & set(PROJECTIONS))} beside the experts, expected none of that name"
        )
    config["target_modules"] = sorted(adapted)
    config["target_parameters"] = [
        f"{parent}.{name}" for parent in sorted(parents) for name in ("gate_up_proj", "down_proj")
    ]
    if not is_shared and config.get("use_rslora"):
        raise ValueError("use_rslora: got true with an A of its own for gate and up, expected one A for both")
    if not is_shared:
        config["r"], config["lora_alpha"] = 2 * config["r"], 2 * config["lora_alpha"]
    return _write(output, config, result)


def _memory_names(names: CheckpointNames) -> dict[str, str]:
    single = {name: ".".join((block, str(expert), part)) for (block, expert, part), name in names.experts.items()}
    return {**{name: module for module, name in names.modules.items()}, **single}


def _in_memory(key: str, in_memory: dict[str, str]) -> str:
    """A key of the checkpoint's names with the name in memory; of those that are the same already, the same."""
    path, mark, rest = key.removeprefix(PREFIX).partition(".lora_")
    if not mark:
        path, mark, rest = path.rpartition(".")
    return f"{PREFIX}{in_memory.get(path, path)}{mark}{rest}"


def _fuse(parts: dict[tuple[int, str, str], Tensor], expert: int, is_shared: bool) -> tuple[Tensor, ...]:
    """A and B of gate and up together, then of down, for one expert."""
    gate_a, gate_b, up_a, up_b, down_a, down_b = (
        parts[expert, name, part] for name in PROJECTIONS for part in ("A", "B")
    )
    if is_shared:
        return gate_a, torch.cat([gate_b, up_b]), down_a, down_b
    nothing = (torch.zeros_like(gate_b), torch.zeros_like(up_b))
    rows = [torch.cat([gate_b, nothing[0]], dim=1), torch.cat([nothing[1], up_b], dim=1)]
    padded = (torch.cat([down_a, torch.zeros_like(down_a)]), torch.cat([down_b, torch.zeros_like(down_b)], dim=1))
    return torch.cat([gate_a, up_a]), torch.cat(rows), *padded


def _is_gate_up(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    """Whether the first gives twice what the second takes, and takes what the second gives."""
    return first[1].shape[0] == 2 * second[0].shape[1] and first[0].shape[1] == second[1].shape[0]


def _by_expert(a: Tensor, b: Tensor, rank: int, block: str) -> tuple[Tensor, Tensor]:
    """[E, r, N] and [E, M, r]."""
    if rank < 1 or a.shape[0] % rank or b.shape[1] != a.shape[0]:
        raise ValueError(f"r: got {rank}, expected a rank that divides the {a.shape[0]} rows of A in {block}")
    return a.view(-1, rank, a.shape[1]), b.view(b.shape[0], rank, -1).permute(2, 0, 1)


def _read(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = Path(source)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"adapter: got {source}, expected a folder with {CONFIG} and {WEIGHTS}")
    config = read_object(folder / CONFIG, "adapter")
    for setting in ("rank_pattern", "alpha_pattern"):
        if config.get(setting):
            raise ValueError(f"{setting}: got {config[setting]}, expected one rank and weight for all")
    try:
        return config, load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"adapter: the weights in {source} are damaged or cut short ({error})") from None


def _write(output: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output: got {output}, expected an empty or absent folder")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder
