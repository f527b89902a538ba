"""Muon for any MoE: each expert's gate, up and down matrix is orthogonalized by itself.

`optimizer: muon` of a recipe picks it. torch has Muon for 2-D matrices only and raises at the experts' 3-D parameters;
here those get a batched Newton-Schulz of their own, all other linear layers torch's `Muon`, and embeddings, head,
routers, norms and biases torch's AdamW. Rates are scaled as in Moonlight, so that one learning rate serves all three.

Axes: E experts, A rows, B columns of one matrix.

Reference:
    Jordan et al. 2024 (Muon); Liu et al. 2025, arXiv 2502.16982, equation 4 (0.2 sqrt(max(A, B)), weight decay).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer
from transformers import Trainer

from modeling_deepseek.families import find_moe_layers

_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_NUM_STEPS = 5
_EPS = 1e-7
_MOMENTUM = 0.95
_SHARDED = "optimizer: got muon with a model that is sharded over processes, expected adamw"


class ExpertMuon(Optimizer):
    """Muon on 3-D parameters, each matrix of each expert by itself.

    Args:
        params: Groups with ``parts``, the number of matrices that stand side by side in each expert of the group (2:
            gate and up), and ``axis``, along which: -2 or -1.
        lr: Learning rate.
        weight_decay: Decoupled, as AdamW's.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "parts": 1, "axis": -2})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take a step.

        Args:
            closure: Not used; for the signature.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum = state["momentum_buffer"]
                momentum.lerp_(parameter.grad, 1 - _MOMENTUM)
                update = parameter.grad.lerp(momentum, _MOMENTUM)
                matrices = update.chunk(group["parts"], group["axis"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * 0.2 * math.sqrt(max(matrices[0].shape[1:]))
                orthogonal = torch.cat([orthogonalize(matrix) for matrix in matrices], group["axis"])
                parameter.add_(orthogonal.to(parameter.dtype), alpha=-rate)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return the nearest half-orthogonal matrices, roughly, by five Newton-Schulz steps in bf16 as torch's Muon does.

    Args:
        matrices: [E, A, B].

    Returns:
        [E, A, B] in bf16; an expert without a gradient stays 0.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.bfloat16()
    found = found.mT if is_tall else found
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(_NUM_STEPS):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if is_tall else found


class MuonWithAdamW(Optimizer):
    """Several optimizers that step as one; their groups are the groups of this one.

    Args:
        parts: By the name under which the state is saved.
    """

    def __init__(self, parts: dict[str, Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts.values() for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take a step with each.

        Args:
            closure: Not used; for the signature.
        """
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state_dict: By name.

        Raises:
            ValueError: Another optimizer wrote it.
        """
        if state_dict.keys() != self.parts.keys():
            raise ValueError(f"optimizer: got a state of {sorted(state_dict)}, expected one of {sorted(self.parts)}")
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]


def build_muon(model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]) -> MuonWithAdamW:
    """Return the optimizer of a model's trained parameters.

    Args:
        model: Of any family.
        lr: Learning rate of all.
        weight_decay: Of all matrices, embeddings included.
        betas: AdamW's.

    Raises:
        ValueError: A parameter is one process's part of a matrix, as FSDP, FSDP2 and ZeRO-3 make them.
    """
    if any(_is_part(parameter) for parameter in model.parameters()):
        raise ValueError(_SHARDED)
    layers = find_moe_layers(model)
    experts = {id(p): layer for layer in layers if layer.experts is not None for p in layer.experts.parameters()}
    skipped = {id(p) for layer in layers for p in layer.router.parameters()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        skipped |= {id(p) for p in module.parameters()} if module is not None else set()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - skipped - experts.keys()
    rest: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    matrices, fused = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in linear:
            matrices.append(parameter)
        elif id(parameter) in experts and parameter.ndim == 3:
            fused.append({"params": [parameter], **_split(experts[id(parameter)].experts, name)})
        else:
            rest[parameter.ndim > 1].append(parameter)
    parts: dict[str, Optimizer] = {}
    if matrices:
        parts["muon"] = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    if fused:
        parts["experts"] = ExpertMuon(fused, lr=lr, weight_decay=weight_decay)
    groups = [{"params": rest[True], "weight_decay": weight_decay}, {"params": rest[False], "weight_decay": 0.0}]
    parts["adamw"] = AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)
    return MuonWithAdamW(parts)


def _split(experts: Any, name: str) -> dict[str, int]:
    """How many matrices an expert's part of a fused parameter is, and along which axis they stand."""
    flags = vars(experts)
    if not name.endswith("gate_up_proj") or not flags["has_gate"]:
        return {"parts": 1, "axis": -2}
    if not flags["is_concatenated"]:
        raise ValueError(
            f"optimizer: got muon for {type(experts).__name__} with gate and up interleaved, expected adamw"
        )
    return {"parts": 2, "axis": -1 if flags["is_transposed"] else -2}


def check_muon(trainer: Trainer) -> None:
    """Refuse what Muon, which needs whole matrices, cannot train.

    Args:
        trainer: Before its optimizer is made.

    Raises:
        ValueError: The model is sharded over processes.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or getattr(trainer, "is_sharded", False):
        raise ValueError(_SHARDED)


def _is_part(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, (DTensor, FlatParameter)) or hasattr(parameter, "ds_id")
