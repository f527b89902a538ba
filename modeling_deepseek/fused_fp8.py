"""`fused_moe_fp8` as an experts implementation of transformers: any MoE that `fused_moe` computes, in FP8.

Importing this file registers it, where deepseek_kernels is installed. Weights on disk and in the optimizer stay as
they are. Experts that were loaded in FP8 keep their codes and their own scales; they are frozen, and pass on the
gradients of input and router, and to an adapter of PEFT those of its factors.
"""

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .expert_adapters import lora_arguments
from .experts_form import find_epilogue
from .fused_experts import find_operands

try:
    from deepseek_kernels.fused_moe_fp8 import fused_moe_fp8
except ImportError:
    fused_moe_fp8 = None
try:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
except ImportError:
    ALL_FP8_EXPERTS_FUNCTIONS = None


def fused_moe_fp8_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the experts' output; the signature transformers' experts interface calls.

    Args:
        self: An experts module decorated with transformers' ``use_experts_implementation``.
        hidden_states: [T, H].
        top_k_index: [T, K]; at or above E means unused.
        top_k_weights: [T, K].

    Raises:
        ValueError: The module is of a kind that the kernel does not compute, or FP8 cannot be had.
    """
    operands = find_operands(self)
    dtype = operands["gate_up_proj"].dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        cast = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
        operands.update({name: operands[name].to(dtype) for name in cast if operands[name] is not None})
    x = hidden_states.to(dtype)
    output = fused_moe_fp8(x, topk_indices=top_k_index, topk_weights=top_k_weights, **operands)
    return output.to(hidden_states.dtype)


def fused_moe_fp8_codes_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the output of experts that were loaded in FP8, by their own codes and scales.

    Args:
        self: transformers' ``FP8Experts``.
        hidden_states: [T, H].
        top_k_index: [T, K]; at or above E means unused.
        top_k_weights: [T, K].

    Raises:
        ValueError: The codes or their scales are of another kind.
    """
    name = type(self).__name__
    for what, got, fits in (
        ("has_gate", self.has_gate, self.has_gate),
        ("activation_scheme", self.activation_scheme, self.activation_scheme == "dynamic"),
        ("block_size", self.block_size, self.block_size is not None),
        ("down_proj in", self.down_proj.dtype, self.down_proj.dtype == torch.float8_e4m3fn),
    ):
        if not fits:
            raise ValueError(
                f"experts_implementation: fused_moe_fp8 does not compute {name} with {what}={got}; use grouped_mm"
            )
    return fused_moe_fp8(
        hidden_states,
        self.gate_up_proj,
        self.down_proj,
        top_k_index,
        top_k_weights,
        activation=find_epilogue(self),
        gate_up_scales=self.gate_up_proj_scale_inv,
        down_scales=self.down_proj_scale_inv,
        block=tuple(self.block_size),
        **lora_arguments(self),
    )


if fused_moe_fp8 is not None:
    ALL_EXPERTS_FUNCTIONS.register("fused_moe_fp8", fused_moe_fp8_experts_forward)
    if ALL_FP8_EXPERTS_FUNCTIONS is not None:
        ALL_FP8_EXPERTS_FUNCTIONS.register("fused_moe_fp8", fused_moe_fp8_codes_forward)
