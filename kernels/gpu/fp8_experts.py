"""The routed experts in FP8 on a GPU: which Triton kernels run, in which order, on what.

``fused_moe_fp8`` calls `route`, `forward` and `backward` for GPU tensors, as it calls those of ``cpu.fp8_experts`` for
CPU tensors, and what is rounded where is the same in both. Two things differ: the order of sums, and the rows of the
input's gradient, which are rounded to the layer's dtype before a token's are added up.

    forward    quantize x, W1, W2 -> gate_up with activation -> grouped_gemm (down) -> combine with weights
    backward   quantize dO, W2^T -> down_backward -> weight_gradient (down), not in FP8
               quantize dh, W1^T -> grouped_gemm -> combine; weight_gradient (gate and up), not in FP8

Low-rank adapters run around the products as in ``experts``: what they add is of x and of the activation as they are.

Codes of weights live for one pass: kept, they would take a byte an element, and could be stale after an optimizer's
step. A group of 128 that a matrix does not fill is filled with zeros.

T tokens, K slots per token, S = T*K rows, H hidden, I expert width, E experts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_kernels.cpu.fp8_experts import Weights
from deepseek_kernels.fp8 import FP8, GROUP
from deepseek_kernels.gpu import adapters as low_rank_adapters
from deepseek_kernels.gpu.adapters import NO_ADAPTERS, Adapters, Call
from deepseek_kernels.gpu.combine import combine
from deepseek_kernels.gpu.fp8_down_backward import down_backward_fp8
from deepseek_kernels.gpu.fp8_gate_up import gate_up_fp8
from deepseek_kernels.gpu.fp8_grouped_gemm import grouped_gemm_fp8
from deepseek_kernels.gpu.fp8_quantize import quantize_blocks, quantize_halves, quantize_rows
from deepseek_kernels.gpu.fp8_tiles import adapter_tiles, choose_fp8_tiles, weight_gradient_tile
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, routing_metadata, tiles_of
from deepseek_kernels.gpu.row_sums import row_sums
from deepseek_kernels.gpu.weight_gradient import weight_gradient
from deepseek_kernels.slot_order import SlotOrder

Codes = tuple[Tensor, Tensor]


def route(topk_indices: Tensor, num_experts: int) -> RoutingMetadata:
    """Return the slots sorted by expert, with the tiles of the row kernels.

    Args:
        topk_indices: [T, K]; negative or at least `num_experts` means unused.
        num_experts: E.
    """
    num_rows = topk_indices.numel()
    if num_rows >= 2**30 or num_experts >= 2**16:
        raise ValueError(
            f"topk_indices: got {num_rows} slots, {num_experts} experts, expected fewer than {2**30} and {2**16}"
        )
    tiles = choose_fp8_tiles(topk_indices.device, num_rows, num_experts)
    return routing_metadata(topk_indices, num_experts, tiles.block_m)


def check_weights(weights: Weights) -> None:
    """Raise a ValueError for codes of a checkpoint whose blocks the kernels do not take.

    Args:
        weights: Both projections.
    """
    width = weights.down.shape[2]
    if weights.gate_up_scales is None:
        return
    if weights.block != (GROUP, GROUP):
        raise ValueError(f"block: got {weights.block} on a GPU, expected ({GROUP}, {GROUP}); use a CPU")
    if width % GROUP:
        raise ValueError(f"down_proj: got {width} columns of FP8 codes on a GPU, expected a multiple of {GROUP}")


def gate_up_codes(weights: Weights, *, transpose: bool = False) -> Codes:
    """Return codes [E, 2 * 128 G_I, 128 G_H] and scales of the first product's weights, or of their transposes.

    Args:
        weights: Both projections.
        transpose: Whether for the gradient of the input.
    """
    if weights.gate_up_scales is not None:
        return _own_codes(weights.gate_up, weights.gate_up_scales, transpose)
    return quantize_blocks(weights.gate_up, parts=2, transpose=transpose)


def down_codes(weights: Weights, *, transpose: bool = False) -> Codes:
    """Return codes [E, 128 G_H, 128 G_I] and scales of the second product's weights, or of their transposes.

    Args:
        weights: Both projections.
        transpose: Whether for the gradient of the activation.
    """
    if weights.down_scales is not None:
        return _own_codes(weights.down, weights.down_scales, transpose)
    return quantize_blocks(weights.down, transpose=transpose)


def forward(
    hidden_states: Tensor,
    weights: Weights,
    order: RoutingMetadata,
    topk_weights: Tensor,
    activation: str,
    bias: Tensor | None,
    keep_preactivation: bool = True,
    codes: tuple[Codes, Codes] | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> tuple[Tensor, Tensor]:
    """Return the experts' weighted sum [T, H] and the pre-activation [S, 2I], undefined beyond the used rows.

    Args:
        hidden_states: [T, H].
        weights: Both projections.
        order: From `route`.
        topk_weights: [T, K].
        activation: Text of the epilogue.
        bias: Of the first product. [E, 2I].
        keep_preactivation: Whether there will be a backward pass; without one it may be empty.
        codes: Of both projections, where they are at hand.
        adapters: Of both projections.
    """
    num_experts, hidden, width = weights.down.shape
    num_slots, dtype = topk_weights.shape[1], hidden_states.dtype
    tiles = choose_fp8_tiles(hidden_states.device, topk_weights.numel(), num_experts)
    call = Call(order, num_slots, adapter_tiles(hidden_states, weights.down, topk_weights.numel()))
    step = activated_rows = None
    if adapters.gate_up is not None:
        step = adapters.gate_up.forward(hidden_states, call, is_by_token=True)
    if adapters.down is not None:
        activated_rows = hidden_states.new_empty(order.row_slot.numel(), width)
    first = codes[0] if codes else gate_up_codes(weights)
    x = quantize_rows(hidden_states)
    activated, preactivation = gate_up_fp8(
        x,
        first,
        order,
        num_slots,
        width,
        dtype,
        tiles.gate_up,
        activation=activation,
        keep_preactivation=keep_preactivation,
        bias=bias,
        low_rank=step,
        activated_rows=activated_rows,
    )
    del first, x
    step = None
    if adapters.down is not None and activated_rows is not None:
        step = adapters.down.forward(activated_rows, call, is_by_token=False)
    del activated_rows
    second = codes[1] if codes else down_codes(weights)
    rows = grouped_gemm_fp8(activated, second, order, hidden, dtype, tiles.down, step)
    return combine(rows, order.slot_row, num_slots, topk_weights), preactivation


def backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    weights: Weights,
    order: SlotOrder,
    topk_weights: Tensor,
    preactivation: Tensor,
    activation: str,
    needs: tuple[bool, ...],
    codes: tuple[Codes, Codes] | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden states, both weights, router weights and the first product's bias.

    Args:
        grad_output: [T, H].
        hidden_states: [T, H].
        weights: Both projections.
        order: As in `forward`.
        topk_weights: [T, K].
        preactivation: Second result of `forward`.
        activation: Text of the epilogue.
        needs: Which of the five are wanted; the others come back as None.
        codes: Of the transposes of both projections, where they are at hand.
        adapters: Of both projections, as the forward pass left them; their gradients are filled.
    """
    needs_x, needs_gate_up, needs_down, needs_weights, needs_bias = needs
    num_experts, hidden, width = weights.down.shape
    num_slots, dtype, num_rows = topk_weights.shape[1], hidden_states.dtype, topk_weights.numel()
    tiles = choose_fp8_tiles(hidden_states.device, num_rows, num_experts)
    weight_tile = weight_gradient_tile(hidden_states, width, num_rows, num_experts)
    metadata = RoutingMetadata(*order.tensors(), tiles_of(order.expert_start, tiles.block_m))
    call, step = Call(metadata, num_slots, adapter_tiles(hidden_states, weights.down, num_rows)), None
    if adapters.down is not None:
        step = adapters.down.backward(grad_output, call, is_by_token=True)
    second = codes[1] if codes else down_codes(weights, transpose=True)
    grad_h, scaled, grad_row_weight = down_backward_fp8(
        quantize_rows(grad_output),
        second,
        preactivation,
        topk_weights,
        metadata,
        activation,
        tiles.down_backward,
        step,
        needs_down or adapters.need_scaled_rows,
    )
    del second
    grad_x = grad_gate_up = grad_down = grad_weights = None
    grad_bias = row_sums(grad_h, metadata) if needs_bias else None
    if needs_down and scaled is not None:
        grad_down = weight_gradient(grad_output, scaled, metadata, num_slots, weight_tile, gather="left")
    step = None
    if adapters.gate_up is not None and (needs_x or adapters.gate_up.needs_a):
        step = adapters.gate_up.backward(grad_h, call, is_by_token=False)
    if adapters is not NO_ADAPTERS:
        adapters.fill_gradients(grad_output, scaled, grad_h, hidden_states, topk_weights, call)
    del scaled
    if needs_x:
        first = codes[0] if codes else gate_up_codes(weights, transpose=True)
        halves = quantize_halves(grad_h, order.expert_start[-1:])
        rows = grouped_gemm_fp8(
            halves, first, metadata, hidden, dtype, tiles.input_gradient, step, is_output_first=False
        )
        grad_x = combine(rows, metadata.slot_row, num_slots)
        del rows, halves, first
    if needs_gate_up:
        grad_gate_up = weight_gradient(grad_h, hidden_states, metadata, num_slots, weight_tile, gather="right")
    if needs_weights:
        slot_row = metadata.slot_row.long()
        by_slot = grad_row_weight[slot_row.clamp(min=0)] if num_rows else grad_row_weight
        grad_weights = by_slot.masked_fill(slot_row < 0, 0).to(topk_weights.dtype).view(topk_weights.shape)
    return grad_x, grad_gate_up, grad_down, grad_weights, grad_bias


def make_adapters(
    factors: Sequence[Tensor],
    scalings: Sequence[float],
    rows: Sequence[Tensor] | None,
    order: SlotOrder,
    dtype: torch.dtype,
    needs: Sequence[bool] = (True,) * 4,
) -> Adapters:
    """Return the adapters of factors as PEFT stores them.

    Args:
        factors: A and B of the first projection, then of the second; without elements where there is none.
        scalings: Of both.
        rows: What the forward pass left in `Adapter.low`; None in the forward pass.
        order: The slots sorted by expert.
        dtype: Of the activations.
        needs: Whose gradients are wanted, in the order of the factors.
    """
    num_rows, num_experts = order.row_slot.numel(), order.expert_start.numel() - 1
    if rows is None:
        ranks = (a.shape[0] // num_experts for a in factors[::2])
        rows = [order.row_slot.new_empty(num_rows, rank, dtype=dtype) for rank in ranks]
    return low_rank_adapters.make_adapters(factors, scalings, rows, num_experts, needs)


def factor_gradients(adapters: Adapters, factors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients of the factors after `backward`; None where none was wanted.

    Args:
        adapters: Of both projections.
        factors: As in `make_adapters`.
    """
    pairs = ((None, None) if one is None else (one.grad_a, one.grad_b) for one in adapters)
    return [gradient for pair in pairs for gradient in pair]


def _own_codes(codes: Tensor, scales: Tensor, transpose: bool) -> Codes:
    """A checkpoint's codes and scales, filled up to whole blocks; without a copy where nothing is to be done."""
    codes, scales = codes.detach().view(torch.uint8), scales.detach().float()
    if transpose:
        codes, scales = codes.transpose(1, 2), scales.transpose(1, 2)
    height, width = codes.shape[1:]
    if height % GROUP or width % GROUP:
        codes = F.pad(codes, (0, -width % GROUP, 0, -height % GROUP))
    return codes.contiguous().view(FP8), scales.contiguous()
