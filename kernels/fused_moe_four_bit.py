"""`fused_moe` on frozen weights that stay in 4 bits: `fused_moe_four_bit`, and `fused_moe_int4` on plain tensors.

Output, and gradients of the input, the router weights and an adapter's factors; the weights get none. On a CPU one
expert's matrix at a time is dense. On a GPU few rows are multiplied by the codes themselves, and many by a dense copy
of one projection that is let go of before the next is made (``gpu/four_bit_experts.py``).

T tokens, K slots per token, S = T*K rows, H hidden, I expert width, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from deepseek_kernels.epilogue import Epilogue, epilogue_text
from deepseek_kernels.four_bit import FourBitFormat, PackedMatrices
from deepseek_kernels.fused_moe import _check, _check_biases, check_are_tensors
from deepseek_kernels.lora import LoraFactors, check_factors, fused_moe_lora
from deepseek_kernels.routed_bias import routed_bias


def fused_moe_four_bit(
    hidden_states: Tensor,
    gate_up_proj: PackedMatrices,
    down_proj: PackedMatrices,
    topk_indices: Tensor,
    topk_weights: Tensor,
    *,
    activation: str | Epilogue = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_lora: LoraFactors | None = None,
    down_lora: LoraFactors | None = None,
) -> Tensor:
    """Return what `fused_moe` returns on the weights that the codes stand for, which are frozen.

    Args:
        hidden_states: [T, H]; float32, bfloat16 or float16. Weights are read in this type.
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        topk_indices: [T, K]; at or above E means unused.
        topk_weights: [T, K].
        activation: As in `fused_moe`.
        gate_up_bias: [E, 2I]; frozen.
        down_bias: [E, H].
        gate_up_lora: Low-rank factors added to `gate_up_proj`.
        down_lora: Low-rank factors added to `down_proj`.

    Raises:
        ValueError: As `fused_moe`, and where codes or scales do not fit their stack.
    """
    check_are_tensors(hidden_states=hidden_states, topk_indices=topk_indices, topk_weights=topk_weights)
    for name, packed in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        check_packed(name, packed)
    gate_up_proj, down_proj = gate_up_proj.to(hidden_states.dtype), down_proj.to(hidden_states.dtype)
    _check(hidden_states, gate_up_proj, down_proj, topk_indices, topk_weights)
    _check_biases(gate_up_proj, down_proj, gate_up_bias, down_bias)
    check_factors(gate_up_proj, down_proj, gate_up_bias, gate_up_lora, down_lora)
    text = epilogue_text(activation)
    indices, weights = topk_indices.contiguous(), topk_weights.contiguous()
    operands = (hidden_states.contiguous(), gate_up_proj, down_proj, indices, weights)
    bias = None if gate_up_bias is None else gate_up_bias.contiguous()
    output = fused_moe_lora(operands, gate_up_lora, down_lora, text, bias)
    return output if down_bias is None else output + routed_bias(down_bias, indices, weights)


def fused_moe_int4(
    hidden_states: Tensor,
    gate_up_packed: Tensor,
    gate_up_scales: Tensor,
    down_packed: Tensor,
    down_scales: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    **settings: Any,
) -> Tensor:
    """Return what `fused_moe_four_bit` returns on weights as compressed-tensors packs them.

    Args:
        hidden_states: [T, H].
        gate_up_packed: [E, 2I, H / 8] int32: eight codes along the input, lowest bits first, offset 8.
        gate_up_scales: [E, 2I, H / group].
        down_packed: [E, H, I / 8] int32.
        down_scales: [E, H, I / group]; the group may be another.
        topk_indices: [T, K].
        topk_weights: [T, K].
        settings: As of `fused_moe_four_bit`.

    Raises:
        ValueError: As `fused_moe_four_bit`.

    Example:
        >>> import torch
        >>> from deepseek_kernels.four_bit import quantize_int4
        >>> w1, w2 = (quantize_int4(torch.ones(16, 8), 8), quantize_int4(torch.ones(8, 8), 8))
        >>> packed = [tensor.unsqueeze(0) for pair in (w1, w2) for tensor in pair]
        >>> ids, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
        >>> fused_moe_int4(torch.ones(2, 8), *packed, ids, weights).shape
        torch.Size([2, 8])
    """
    check_are_tensors(
        hidden_states=hidden_states,
        gate_up_packed=gate_up_packed,
        gate_up_scales=gate_up_scales,
        down_packed=down_packed,
        down_scales=down_scales,
    )
    stacks: list[PackedMatrices] = []
    for name, codes, scales in (
        ("gate_up_packed", gate_up_packed, gate_up_scales),
        ("down_packed", down_packed, down_scales),
    ):
        if codes.dim() != 3 or scales.dim() != 3 or scales.shape[2] == 0 or 8 * codes.shape[2] % scales.shape[2]:
            got = f"shapes {tuple(codes.shape)} and {tuple(scales.shape)} of codes and scales"
            raise ValueError(f"{name}: got {got}, expected [E, M, N / 8] and [E, M, N / group]")
        width = 8 * codes.shape[2]
        fmt = FourBitFormat.of(4, "int4", width // scales.shape[2])
        stacks.append(PackedMatrices(codes, scales, (*codes.shape[:2], width), fmt, hidden_states.dtype))
    return fused_moe_four_bit(hidden_states, stacks[0], stacks[1], topk_indices, topk_weights, **settings)


def check_packed(name: str, packed: PackedMatrices) -> None:
    """Raise a ValueError in one line where codes or scales are not those of the stack's shape.

    Args:
        name: Of the stack.
        packed: [E, M, N].
    """
    if not isinstance(packed, PackedMatrices):
        raise ValueError(f"{name}: got {type(packed).__name__}, expected PackedMatrices")
    packed.format.check(name, packed.shape)
    shapes = packed.format.shapes(packed.shape)
    for part, tensor, shape in zip(("codes", "scales"), (packed.codes, packed.scales), shapes, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got {part} of shape {tuple(tensor.shape)}, expected {shape}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: got {part} with strides {tensor.stride()}, expected a contiguous tensor")
        if tensor.device != packed.device:
            raise ValueError(f"{name}: got {part} on {tensor.device}, expected {packed.device}, where the codes are")
    dtype = torch.uint8 if packed.format.name == "nf4" else torch.int32
    if packed.codes.dtype != dtype or not packed.scales.is_floating_point():
        got = f"codes of {packed.codes.dtype} and scales of {packed.scales.dtype}"
        raise ValueError(f"{name}: got {got}, expected {dtype} and floats")
