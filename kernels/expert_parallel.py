"""Experts split over processes: rows travel to the process that has their expert, and its results travel back.

``modeling_deepseek.fused_expert_parallel`` registers it with transformers. It differs from transformers' all-to-all in
what is sent and kept. A slot that is not used is not sent. The router's weight travels with its row, so that the
expert's process multiplies by it before rounding and finds its gradient at no cost; the sender only adds up what comes
back, and keeps none of it for the backward pass. The slots are sorted by the kernel that `fused_moe` sorts with, and
each process computes its rows as tokens of one expert each, which `fused_moe` writes in place.

    sender      sort slots -> gather rows                         -> sum a token's rows
                     one all-to-all of counts, one of rows, one of weights, one of results
    receiver                         experts, one slot per row

T tokens, K slots per token, H hidden, E experts of all processes, e of this one, R rows this process receives.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_kernels.cpu.experts import route
from deepseek_kernels.cpu.products import accumulation_dtype
from deepseek_kernels.slot_order import SlotOrder
from deepseek_kernels.triton_path import runs_triton

try:
    from deepseek_kernels.gpu.combine import combine
    from deepseek_kernels.gpu.routing_metadata import routing_metadata
except ImportError:  # no Triton on this system; `runs_triton` then says no
    pass

# Where only the order is wanted, the number of tiles that comes with it does not matter.
_BLOCK_M = 128


@torch.compiler.disable
def exchange_experts(
    hidden_states: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    num_local_experts: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """Return the weighted sum of each token's experts, [T, H], wherever they are; differentiable.

    Every process of the group calls this at the same time, each with tokens of its own. The host waits for the counts,
    so it is not for a CUDA graph.

    Args:
        hidden_states: [T, H].
        topk_indices: [T, K] of experts 0 to E - 1; E or above means unused. Process r has experts r*e to (r+1)*e - 1.
        topk_weights: [T, K].
        experts: Computes rows [R, H] with local experts [R, 1] and weights [R, 1].
        num_local_experts: e.
        group: The processes that share one set of experts.
    """
    num_processes, num_slots = dist.get_world_size(group), topk_indices.shape[1]
    order = _sort(topk_indices, num_local_experts * num_processes, hidden_states)
    send_counts = order.expert_start.diff().view(num_processes, num_local_experts)
    receive_counts = torch.empty_like(send_counts)
    dist.all_to_all_single(receive_counts, send_counts, group=group)
    sizes = torch.stack([send_counts.sum(1), receive_counts.sum(1)]).tolist()
    slots = order.row_slot[: sum(sizes[0])]
    tokens = slots // num_slots
    rows = _GatherRows.apply(hidden_states, order.slot_row, tokens, num_slots)
    rows = _Exchange.apply(rows, *sizes, group)
    weights = _Exchange.apply(topk_weights.reshape(-1).index_select(0, slots), *sizes, group).unsqueeze(1)
    local = torch.arange(num_local_experts, device=rows.device).repeat(num_processes)
    local = local.repeat_interleave(receive_counts.flatten(), output_size=rows.shape[0]).unsqueeze(1)
    if rows.shape[0] == 0:
        # Some experts' implementations know no empty input, and all processes have to take part in the backward pass.
        computed = experts(rows.sum(0, keepdim=True), local.new_zeros(1, 1), weights.sum(0, keepdim=True))[:0]
    else:
        computed = experts(rows, local, weights)
    return _SumRows.apply(_Exchange.apply(computed, *reversed(sizes), group), order.slot_row, tokens, num_slots)


def _sort(topk_indices: Tensor, num_experts: int, hidden_states: Tensor) -> SlotOrder:
    if runs_triton(hidden_states):
        return routing_metadata(topk_indices.contiguous(), num_experts, _BLOCK_M)
    return route(topk_indices, num_experts)


def _sum_rows(rows: Tensor, slot_row: Tensor, tokens: Tensor, num_slots: int) -> Tensor:
    """[T, H]: the sum of each token's rows, rounded once."""
    if runs_triton(rows):
        return combine(rows.contiguous(), slot_row, num_slots)
    wide = accumulation_dtype(rows.dtype)
    output = rows.new_zeros(slot_row.numel() // num_slots, rows.shape[1], dtype=wide)
    return output.index_add_(0, tokens, rows.to(wide)).to(rows.dtype)


class _GatherRows(torch.autograd.Function):
    """A token's row, once for each slot that it uses, in the order of the experts."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, slot_row: Tensor, tokens: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slot_row, tokens)
        ctx.num_slots = num_slots
        return hidden_states.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        slot_row, tokens = ctx.saved_tensors
        return _sum_rows(grad_rows, slot_row, tokens, ctx.num_slots), None, None, None


class _SumRows(torch.autograd.Function):
    """The transpose of `_GatherRows`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slot_row: Tensor, tokens: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(tokens)
        return _sum_rows(rows, slot_row, tokens, num_slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        return grad_output.index_select(0, tokens), None, None, None


class _Exchange(torch.autograd.Function):
    """Each process's rows to the others, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (send, receive), group
        return _exchanged(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        send, receive = ctx.sizes
        return _exchanged(grad_rows, receive, send, ctx.group), None, None, None


def _exchanged(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received
