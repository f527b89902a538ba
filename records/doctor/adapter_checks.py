"""Checks of a LoRA adapter, and of what a recipe asks of one."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from deepseek_records.doctor.subject import Finding, Subject

_PART = re.compile(r"^(?:base_model\.model\.)?(?P<module>.*?)\.lora_(?:embedding_)?[AB](?:\.\w+)?$")
# Names that mean the experts too where these are linear layers, and miss them where they are fused.
_EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "all-linear", "experts"}
# How much more alike, as a cosine, one expert's columns of B must be in the wrong order than in the right one.
# Adapters of three families, trained for 5 to 40 steps, lay at least 0.09 on either side of 0.
_MARGIN = 0.04


def lora_misses_experts(subject: Subject) -> Finding | None:
    """Names of projections in a configuration, and no expert among what they reach: fused experts are not linear."""
    experts = subject.expert_parameters()
    if subject.adapter is not None:
        config, reached = subject.adapter.config, any(".experts." in name for name in subject.adapter.tensors)
    else:
        config = {
            "target_modules": subject.settings.get("lora_target_modules", subject.settings.get("target_modules")),
            "target_parameters": subject.settings.get(
                "lora_target_parameters", subject.settings.get("target_parameters")
            ),
        }
        # Our own models give per-expert names to their experts.
        reached = subject.is_ours or bool(config["target_parameters"])
    named = _EXPERT_NAMES & set(_names(config))
    if reached or not experts or not named:
        return None
    parts = sorted({".".join(name.split(".")[-2:]) for name in experts})
    return Finding(
        f"LoRA on {', '.join(sorted(named))} reaches no expert: they are fused tensors in "
        f"{type(subject.layers[0].block).__name__}",
        f"LoraConfig(target_parameters={parts})",
    )


def _names(config: Mapping[str, Any]) -> list[str]:
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return re.findall(r"all-linear|\w+", targets)
    return [str(target).rpartition(".")[2] for target in targets]


def adapter_without_effect(subject: Subject) -> Finding | None:
    """Tensors without a module in the model, or B matrices that are all zero."""
    adapter = subject.trained_adapter
    modules = {name for name, _ in subject.skeleton.named_modules()}
    strangers = [name for name in adapter.tensors if not _has_module(name, modules, subject.is_ours)]
    if strangers:
        return Finding(
            f"{len(strangers)} of {len(adapter.tensors)} tensors of the adapter belong to no module of this model, "
            f"{strangers[0]} among them",
            f"load it with its own base, {adapter.config.get('base_model_name_or_path') or 'which it does not name'}",
        )
    matrices = {name: tensor for name, tensor in adapter.tensors.items() if "lora_B" in name or "embedding_B" in name}
    if matrices and not any(tensor.any() for tensor in matrices.values()):
        return Finding(
            f"all {len(matrices)} B matrices of the adapter are zero: it changes nothing",
            "train it, or look for a frozen adapter (requires_grad, learning rate 0)",
        )
    if adapter.config.get("lora_alpha") == 0:
        return Finding("lora_alpha is 0: the adapter changes nothing", "set lora_alpha above 0")
    return None


def _has_module(name: str, modules: set[str], is_ours: bool) -> bool:
    match = _PART.match(name)
    if match is None:  # modules_to_save, and what other methods than LoRA save
        return True
    module = match["module"].replace(".base_layer", "")
    if is_ours:
        module = re.sub(r"\.experts\.\d+\..*$", ".experts", module)
    return module in modules


def adapter_packed_wrongly(subject: Subject) -> Finding | None:
    """B of fused experts as `[out, E * r]` with experts outermost; PEFT reads `[out, r * E]`, experts innermost.

    The columns of one expert are combinations of the gradients of that expert's tokens, hence more alike than columns
    of different experts. In which order they are tells how B was packed.
    """
    adapter = subject.trained_adapter
    num_experts = {layer.num_experts for layer in subject.layers if layer.num_experts}
    votes = []
    for name, tensor in adapter.tensors.items():
        if ".experts." not in name or "lora_B" not in name or tensor.ndim != 2:
            continue
        for number in num_experts:
            rank, rest = divmod(tensor.shape[1], number)
            if rest == 0 and rank > 1 and tensor.any():
                place = torch.arange(number * rank)
                votes.append(_likeness(tensor, place // rank) - _likeness(tensor, place % number))
    if not votes or sum(votes) / len(votes) < _MARGIN:
        return None
    return Finding(
        f"{len(votes)} B matrices of fused experts are packed with the experts outermost; PEFT reads them innermost",
        "B = B.view(out, E, r).transpose(1, 2).reshape(out, r * E), for every experts tensor",
    )


def _likeness(matrix: torch.Tensor, experts: torch.Tensor) -> float:
    """Mean absolute cosine between columns of one expert, less that between columns of different experts."""
    columns = F.normalize(matrix.float(), dim=0)
    cosines = (columns.T @ columns).abs()
    is_same = experts.unsqueeze(0) == experts.unsqueeze(1)
    is_self = torch.eye(len(experts), dtype=torch.bool)
    return (cosines[is_same & ~is_self].mean() - cosines[~is_same].mean()).item()
