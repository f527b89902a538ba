"""The routed experts in FP8 on a CPU: the codes of a GPU's FP8 products, multiplied in float32.

``fused_moe_fp8`` calls `route`, `forward` and `backward`. Each operand is rounded to FP8 as ``fp8`` says, and the
product of what the codes stand for is summed in float32. That is what a tensor core computes, its short accumulator
aside. It is slower than ``fused_moe``: what it is for is to state accuracy without a GPU, and to be the witness of the
GPU's kernels.

    forward     h = x W1^T and y = a W2^T in FP8         x by token, before the gather; h rounded to x's dtype and kept
    backward    da = dO W2 and dx = dh W1 in FP8         dW1 and dW2 from dh, x, dO, a as they are, without FP8

T tokens, K slots per token, S = T*K rows, H hidden, I expert width, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_kernels.cpu.experts import route
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.fp8 import dequantize, rounded_blocks, rounded_rows
from deepseek_kernels.slot_order import SlotOrder

__all__ = ["Weights", "backward", "forward", "route"]


@dataclass(frozen=True)
class Weights:
    """Both projections, as they come: in a wider dtype, or as FP8 codes with the scales of a checkpoint.

    Attributes:
        gate_up: [E, 2I, H].
        down: [E, H, I].
        gate_up_scales: [E, ., .], of FP8 codes only.
        down_scales: [E, ., .], of FP8 codes only.
        block: Rows and columns that one of those scales is for.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor | None = None
    down_scales: Tensor | None = None
    block: tuple[int, int] = (128, 128)

    def gate_up_of(self, expert: int) -> Tensor:
        """Return [2I, H] in float32; gates and ups each begin a block.

        Args:
            expert: Which.
        """
        if self.gate_up_scales is not None:
            return dequantize(self.gate_up[expert], self.gate_up_scales[expert], self.block)
        return torch.cat([rounded_blocks(half) for half in self.gate_up[expert].chunk(2)])

    def down_of(self, expert: int) -> Tensor:
        """Return [H, I] in float32.

        Args:
            expert: Which.
        """
        if self.down_scales is not None:
            return dequantize(self.down[expert], self.down_scales[expert], self.block)
        return rounded_blocks(self.down[expert])


def forward(
    hidden_states: Tensor,
    weights: Weights,
    order: SlotOrder,
    topk_weights: Tensor,
    activation: str,
    bias: Tensor | None,
    keep_preactivation: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the experts' weighted sum [T, H] and the pre-activation [S, 2I] of every used row.

    Args:
        hidden_states: [T, H].
        weights: Both projections.
        order: The slots sorted by expert.
        topk_weights: [T, K].
        activation: Text of the epilogue.
        bias: Of the first product. [E, 2I].
        keep_preactivation: Whether there will be a backward pass; without one it comes back empty.
    """
    epilogue, dtype = Epilogue.read(activation), hidden_states.dtype
    x, output = rounded_rows(hidden_states), torch.zeros_like(hidden_states, dtype=torch.float32)
    kept = hidden_states.new_zeros(order.row_slot.numel(), weights.gate_up.shape[1])
    for expert, rows, tokens, weight in _experts(order, topk_weights):
        h = x[tokens] @ weights.gate_up_of(expert).T
        kept[rows] = h if bias is None else h + bias[expert].float()
        a = epilogue.apply(kept[rows].float())
        y = (rounded_rows(a) @ weights.down_of(expert).T).to(dtype)
        output.index_add_(0, tokens, y.float() * weight)
    return output.to(dtype), kept if keep_preactivation else kept[:0]


def backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    weights: Weights,
    order: SlotOrder,
    topk_weights: Tensor,
    preactivation: Tensor,
    activation: str,
    needs: tuple[bool, ...],
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
    """
    needs_x, needs_gate_up, needs_down, needs_weights, needs_bias = needs
    epilogue, dtype = Epilogue.read(activation), hidden_states.dtype
    grad_y = rounded_rows(grad_output)
    grad_x = torch.zeros_like(hidden_states, dtype=torch.float32) if needs_x else None
    grad_gate_up = torch.zeros_like(weights.gate_up) if needs_gate_up else None
    grad_down = torch.zeros_like(weights.down) if needs_down else None
    grad_slots = torch.zeros_like(topk_weights, dtype=torch.float32).view(-1) if needs_weights else None
    grad_bias = hidden_states.new_zeros(weights.gate_up.shape[:2]) if needs_bias else None
    for expert, rows, tokens, weight in _experts(order, topk_weights):
        grad_a = grad_y[tokens] @ weights.down_of(expert)
        h = preactivation[rows].float().requires_grad_()
        with torch.enable_grad():
            a = epilogue.apply(h)
        if grad_slots is not None:
            grad_slots[order.row_slot[rows].long()] = torch.linalg.vecdot(grad_a, a.detach())
        if grad_down is not None:
            scaled = (a.detach() * weight).to(dtype)
            grad_down[expert] = grad_output[tokens].T @ scaled
        (grad_h,) = torch.autograd.grad(a, h, grad_a * weight)
        if grad_bias is not None:
            grad_bias[expert] = grad_h.sum(0)
        grad_h = grad_h.to(dtype)
        if grad_gate_up is not None:
            grad_gate_up[expert] = grad_h.T @ hidden_states[tokens]
        if grad_x is not None:
            halves = torch.cat([rounded_rows(half) for half in grad_h.chunk(2, dim=1)], dim=1)
            grad_x.index_add_(0, tokens, halves @ weights.gate_up_of(expert))
    grad_weights = None if grad_slots is None else grad_slots.to(topk_weights.dtype).view(topk_weights.shape)
    return None if grad_x is None else grad_x.to(dtype), grad_gate_up, grad_down, grad_weights, grad_bias


def _experts(order: SlotOrder, topk_weights: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Yield expert, its slice of rows, their tokens and router weights, leaving empty experts out."""
    slots, num_slots = order.row_slot.long(), topk_weights.shape[1]
    start = 0
    for expert, count in enumerate(order.counts()):
        if count:
            rows = slice(start, start + count)
            yield expert, rows, slots[rows] // num_slots, topk_weights.reshape(-1)[slots[rows]].float().unsqueeze(1)
            start += count
