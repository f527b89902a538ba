"""`fused_moe` as an experts implementation of transformers, for this model and any other MoE.

Importing this file registers it, where deepseek_kernels is installed; ``experts_implementation="fused_moe"`` then
picks it. Transformers describes an experts module by flags (`has_gate`, `is_transposed`, ...) that only
its own implementations are written to obey, so whatever the kernel does not compute is refused here by name, at the
first forward pass, rather than computed wrongly.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from .expert_adapters import lora_arguments
from .experts_form import find_epilogue

try:
    from deepseek_kernels.fused_moe import fused_moe
except ImportError:
    fused_moe = None

logger = logging.get_logger(__name__)


def fused_moe_experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    max_rows: int | None = None,
) -> Tensor:
    """Return the experts' output; the signature transformers' experts interface calls.

    Args:
        self: An experts module decorated with transformers' ``use_experts_implementation``.
        hidden_states: [T, H].
        top_k_index: [T, K]; at or above E means unused.
        top_k_weights: [T, K].
        max_rows: As for `fused_moe`.

    Raises:
        ValueError: The module is of a kind that the kernel does not compute.
    """
    operands = find_operands(self)
    # A norm kept in fp32 may feed experts in bf16 (https://github.com/pytorch/pytorch/issues/174763). Under autocast
    # `fused_moe` casts both.
    is_autocast = not hidden_states.is_meta and torch.is_autocast_enabled(hidden_states.device.type)
    x = hidden_states if is_autocast else hidden_states.to(operands["gate_up_proj"].dtype)
    output = fused_moe(x, topk_indices=top_k_index, topk_weights=top_k_weights, max_rows=max_rows, **operands)
    return output.to(hidden_states.dtype)


def find_operands(experts: nn.Module) -> dict[str, Any]:
    """Return the weights, biases, adapters and epilogue of a module, by the names of `fused_moe`'s arguments.

    Args:
        experts: An experts module decorated with transformers' ``use_experts_implementation``.

    Raises:
        ValueError: The module is of a kind that the kernel does not compute.
    """
    _refuse_unsupported(experts)
    epilogue = find_epilogue(experts)
    gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj
    adapters = lora_arguments(experts)
    gate_up_bias, down_bias = (experts.gate_up_proj_bias, experts.down_proj_bias) if experts.has_bias else (None, None)
    if experts.is_transposed:
        logger.warning_once(
            f"fused_moe: {type(experts).__name__} stores its weights transposed; they are copied on every call"
        )
        gate_up_proj, down_proj = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
        # An adapter's rows are in the order of the weights as they are stored.
        if epilogue.is_interleaved and not adapters:  # The copy can as well put gates before ups, which is faster.
            gate_up_proj, epilogue = _gates_first(gate_up_proj), dataclasses.replace(epilogue, is_interleaved=False)
            gate_up_bias = None if gate_up_bias is None else _gates_first(gate_up_bias)
    return {
        "gate_up_proj": gate_up_proj.contiguous(),
        "down_proj": down_proj.contiguous(),
        "activation": epilogue,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
        **adapters,
    }


def _gates_first(interleaved: Tensor) -> Tensor:
    """Rows (dimension 1) 0, 2, 4, ... before 1, 3, 5, ..."""
    return interleaved.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def _refuse_unsupported(experts: nn.Module) -> None:
    for flag, refused in (
        ("has_gate", not experts.has_gate),
        # Added to the flags after transformers 5.17.
        ("has_post_expert_norm", vars(experts).get("has_post_expert_norm", False)),
    ):
        if refused:
            value = vars(experts)[flag]
            raise ValueError(
                f"experts_implementation: fused_moe does not compute {type(experts).__name__} with {flag}={value}; "
                "use grouped_mm"
            )
    if experts.has_bias and not (hasattr(experts, "gate_up_proj_bias") and hasattr(experts, "down_proj_bias")):
        raise ValueError(
            f"experts_implementation: fused_moe does not compute {type(experts).__name__} with has_bias=True and "
            "without gate_up_proj_bias and down_proj_bias; use grouped_mm"
        )


if fused_moe is not None:
    ALL_EXPERTS_FUNCTIONS.register("fused_moe", fused_moe_experts_forward)
