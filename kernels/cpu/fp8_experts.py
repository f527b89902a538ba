"""The routed experts in FP8 on a CPU: the codes of a GPU's FP8 products, multiplied in float32.

``fused_moe_fp8`` calls `route`, `forward` and `backward`. Each operand is rounded to FP8 as ``fp8`` says, and the
product of what the codes stand for is summed in float32. That is what a tensor core computes, its short accumulator
aside. It is slower than ``fused_moe``: what it is for is to state accuracy without a GPU, and to be the witness of the
GPU's kernels.

    forward     h = x W1^T and y = a W2^T in FP8         x by token, before the gather; h rounded to x's dtype and kept
    backward    da = dO W2 and dx = dh W1 in FP8         dW1 and dW2 from dh, x, dO, a as they are, without FP8

Low-rank adapters add ``x A^T B^T`` of x and a as they are, not of their codes, summed in float32 as well.

T tokens, K slots per token, S = T*K rows, H hidden, I expert width, E experts, r rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_kernels.cpu.experts import route
from deepseek_kernels.cpu.low_rank import NO_ADAPTERS, Adapters, LowRank, in_pefts_order, stacked
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.fp8 import dequantize, rounded_blocks, rounded_rows
from deepseek_kernels.slot_order import SlotOrder

__all__ = ["Weights", "backward", "factor_gradients", "forward", "make_adapters", "route"]


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
    adapters: Adapters = NO_ADAPTERS,
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
        adapters: Of both projections.
    """
    epilogue, dtype = Epilogue.read(activation), hidden_states.dtype
    x, output = rounded_rows(hidden_states), torch.zeros_like(hidden_states, dtype=torch.float32)
    kept = hidden_states.new_zeros(order.row_slot.numel(), weights.gate_up.shape[1])
    for expert, rows, tokens, weight in _experts(order, topk_weights):
        h = x[tokens] @ weights.gate_up_of(expert).T
        if adapters.gate_up is not None:
            adapters.gate_up.add_one(expert, rows, hidden_states[tokens].float(), h)
        kept[rows] = h if bias is None else h + bias[expert].float()
        a = epilogue.apply(kept[rows].float())
        y = rounded_rows(a) @ weights.down_of(expert).T
        if adapters.down is not None:
            adapters.down.add_one(expert, rows, a.to(dtype).float(), y)
            adapters.down.low[rows] *= weight  # as the gradient of B multiplies them
        output.index_add_(0, tokens, y.to(dtype).float() * weight)
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
        adapters: Of both projections, as the forward pass left them; their gradients are filled.
    """
    needs_x, needs_gate_up, needs_down, needs_weights, needs_bias = needs
    epilogue, dtype = Epilogue.read(activation), hidden_states.dtype
    grad_y = rounded_rows(grad_output)
    grad_x = torch.zeros_like(hidden_states, dtype=torch.float32) if needs_x else None
    grad_gate_up = torch.zeros_like(weights.gate_up) if needs_gate_up else None
    grad_down = torch.zeros_like(weights.down) if needs_down else None
    grad_slots = torch.zeros_like(topk_weights, dtype=torch.float32).view(-1) if needs_weights else None
    grad_bias = hidden_states.new_zeros(weights.gate_up.shape[:2]) if needs_bias else None
    for adapter in adapters:
        if adapter is not None:
            adapter.make_gradients()
    for expert, rows, tokens, weight in _experts(order, topk_weights):
        grad_a = grad_y[tokens] @ weights.down_of(expert)
        h = preactivation[rows].float().requires_grad_()
        with torch.enable_grad():
            a = epilogue.apply(h)
        if adapters.down is not None:
            scaled = (a.detach() * weight).to(dtype).float()
            adapters.down.backward_one(expert, rows, grad_output[tokens].float(), scaled, grad_a)
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
        grad_rows = None
        if grad_x is not None:
            halves = torch.cat([rounded_rows(half) for half in grad_h.chunk(2, dim=1)], dim=1)
            grad_rows = halves @ weights.gate_up_of(expert)
        if adapters.gate_up is not None:
            adapters.gate_up.backward_one(expert, rows, grad_h.float(), hidden_states[tokens].float(), grad_rows)
        if grad_x is not None:
            grad_x.index_add_(0, tokens, grad_rows)
    grad_weights = None if grad_slots is None else grad_slots.to(topk_weights.dtype).view(topk_weights.shape)
    return None if grad_x is None else grad_x.to(dtype), grad_gate_up, grad_down, grad_weights, grad_bias


def make_adapters(
    factors: Sequence[Tensor],
    scalings: Sequence[float],
    rows: Sequence[Tensor] | None,
    order: SlotOrder,
    dtype: torch.dtype,
    needs: Sequence[bool] = (True,) * 4,
) -> Adapters:
    """Return the adapters of factors as PEFT stores them, which multiply in float32.

    Args:
        factors: A and B of the first projection, then of the second; without elements where there is none.
        scalings: Of both.
        rows: What the forward pass left in `LowRank.low`, [S, r] each; None in the forward pass.
        order: The slots sorted by expert.
        dtype: Of the activations, to which the factors are rounded.
        needs: Unused; a GPU leaves gradients out that are not wanted.
    """
    num_rows, num_experts = order.row_slot.numel(), order.expert_start.numel() - 1
    pair: list[LowRank | None] = []
    for i in range(2):
        a, b = factors[2 * i : 2 * i + 2]
        if not a.numel():
            pair.append(None)
            continue
        kept = torch.zeros(num_rows, a.shape[0] // num_experts) if rows is None else rows[i]
        wide = stacked(a.to(dtype).float(), b.to(dtype).float(), num_experts)
        pair.append(LowRank(*wide, scalings[i], kept, order.expert_start))
    return Adapters(*pair)


def factor_gradients(adapters: Adapters, factors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients of the factors after `backward`, in PEFT's order and in their dtype; None where none is.

    Args:
        adapters: Of both projections.
        factors: As in `make_adapters`.
    """
    found: list[Tensor | None] = []
    for adapter, a, b in zip(adapters, factors[::2], factors[1::2], strict=True):
        if adapter is None:
            found += [None, None]
        else:
            found += [adapter.grad_a.view(a.shape).to(a.dtype), in_pefts_order(adapter.grad_b, b.dtype)]
    return found


def _experts(order: SlotOrder, topk_weights: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Yield expert, its slice of rows, their tokens and router weights, leaving empty experts out."""
    slots, num_slots = order.row_slot.long(), topk_weights.shape[1]
    start = 0
    for expert, count in enumerate(order.counts()):
        if count:
            rows = slice(start, start + count)
            yield expert, rows, slots[rows] // num_slots, topk_weights.reshape(-1)[slots[rows]].float().unsqueeze(1)
            start += count
