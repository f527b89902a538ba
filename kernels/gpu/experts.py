"""The routed experts on a GPU: which Triton kernels run, in which order, on what.

``fused_moe`` calls `forward` and `backward` for GPU tensors, and for CPU tensors under TRITON_INTERPRET=1, where the
tests run them. Nothing here asks the device for a value, so a call never waits and can be captured in a CUDA graph.

    forward    routing_metadata -> gate_up -> grouped_gemm (down) -> combine with weights
    backward   down_backward -> weight_gradient (down), grouped_gemm -> combine, weight_gradient (gate and up)

With one slot per token the last product of each pass writes in the tokens' places, and nothing is combined but the
router weights' gradient. Around the products run those of low-rank adapters, if there are any (``adapters.py``). The
projections may be in 4 bits: without adapters few rows are multiplied by the codes themselves
(``four_bit_experts.py``), else kernels get a dense copy that is let go of right after (`dense`).

T tokens, K slots per token, S = T*K slots, R rows (S unless bounded), H hidden, I expert width, E experts.
"""

from torch import Tensor

from deepseek_kernels.four_bit import PackedMatrices
from deepseek_kernels.gpu.adapters import NO_ADAPTERS, Adapters, Call
from deepseek_kernels.gpu.combine import combine, combine_gradients
from deepseek_kernels.gpu.decode import MAX_TOKENS, decode
from deepseek_kernels.gpu.down_backward import down_backward
from deepseek_kernels.gpu.four_bit_dequantize import dense
from deepseek_kernels.gpu.four_bit_experts import packed_tiles
from deepseek_kernels.gpu.four_bit_products import four_bit_gate_up, four_bit_gemm
from deepseek_kernels.gpu.gate_up import gate_up
from deepseek_kernels.gpu.grouped_gemm import grouped_gemm, grouped_gemm_by_slot
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, routing_metadata, tiles_of
from deepseek_kernels.gpu.row_sums import row_sums
from deepseek_kernels.gpu.tiles import Tiles, choose_tiles, row_bucket
from deepseek_kernels.gpu.weight_gradient import weight_gradient
from deepseek_kernels.slot_order import SlotOrder


def forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor | PackedMatrices,
    down_proj: Tensor | PackedMatrices,
    topk_indices: Tensor,
    topk_weights: Tensor,
    activation: str,
    keep_preactivation: bool,
    gate_up_bias: Tensor | None = None,
    adapters: Adapters = NO_ADAPTERS,
    max_rows: int | None = None,
) -> tuple[Tensor, Tensor, RoutingMetadata | None]:
    """Return the output [T, H], the pre-activation [R, 2I] (empty unless kept) and the sorted order.

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        topk_indices: [T, K].
        topk_weights: [T, K].
        activation: Text of the epilogue.
        keep_preactivation: Whether there will be a backward pass.
        gate_up_bias: [E, 2I].
        adapters: Of both projections.
        max_rows: R, fewer than S; None for S. A token of a slot without a row comes out NaN.
    """
    _check_sizes(topk_indices, gate_up_proj)
    num_tokens, num_slots, has_adapters = hidden_states.shape[0], topk_indices.shape[1], adapters is not NO_ADAPTERS
    if num_tokens == 0 and not keep_preactivation and not has_adapters:
        return hidden_states.clone(), hidden_states.new_empty(0, gate_up_proj.shape[1]), None
    inputs = (hidden_states, gate_up_proj, down_proj, topk_indices, topk_weights)
    # `decode` knows neither adapters nor codes nor bounds.
    is_small = 0 < num_tokens <= MAX_TOKENS and not has_adapters and all(isinstance(one, Tensor) for one in inputs)
    is_small = is_small and max_rows is None
    if is_small and not keep_preactivation:
        return *decode(*inputs, activation, bias=gate_up_bias), None
    packed = None if has_adapters else packed_tiles(*inputs[:4])
    tiles = tiles_for(hidden_states, down_proj, topk_indices.numel() if max_rows is None else max_rows)
    metadata = routing_metadata(topk_indices, gate_up_proj.shape[0], (packed or tiles).block_m, max_rows)
    if is_small:
        return *decode(*inputs, activation, metadata, gate_up_bias), metadata
    settings = (metadata, num_slots, activation, keep_preactivation)
    if packed is not None:
        activated, preactivation = four_bit_gate_up(
            hidden_states, gate_up_proj, *settings, packed.gate_up, gate_up_bias
        )
        rows = four_bit_gemm(activated, down_proj, metadata, packed.down)
        return combine(rows, metadata.slot_row, num_slots, topk_weights), preactivation, metadata
    step = None
    if adapters.gate_up is not None:
        step = adapters.gate_up.forward(hidden_states, Call(metadata, num_slots, tiles), is_by_token=True)
    stack = dense(gate_up_proj, metadata.expert_start)
    activated, preactivation = gate_up(hidden_states, stack, *settings, tiles.gate_up, gate_up_bias, step)
    del stack  # a copy of what is in 4 bits: gone before the next is made
    step = None
    if adapters.down is not None:
        step = adapters.down.forward(activated, Call(metadata, num_slots, tiles), is_by_token=False)
    stack = dense(down_proj, metadata.expert_start)
    if num_slots == 1:
        last = grouped_gemm_by_slot(
            activated, stack, metadata, tiles.down, topk_weights, transpose=True, low_rank=step
        )
        return last, preactivation, metadata
    rows = grouped_gemm(activated, stack, metadata, tiles.down, transpose=True, low_rank=step)
    del stack
    return combine(rows, metadata.slot_row, num_slots, topk_weights), preactivation, metadata


def backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor | PackedMatrices,
    down_proj: Tensor | PackedMatrices,
    order: SlotOrder,
    topk_weights: Tensor,
    preactivation: Tensor,
    activation: str,
    needs: list[bool],
    adapters: Adapters = NO_ADAPTERS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of hidden states, both weights, router weights and the first product's bias.

    Args:
        grad_output: [T, H].
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        order: As in `forward`.
        topk_weights: [T, K].
        preactivation: Second result of `forward`.
        activation: Text of the epilogue.
        needs: Which of the five gradients are wanted; the others come back empty.
        adapters: Of both projections, as the forward pass left them; their gradients are filled.
    """
    needs_x, needs_gate_up, needs_down, needs_weights, needs_bias = needs
    num_slots, has_adapters = topk_weights.shape[1], adapters is not NO_ADAPTERS
    tiles = tiles_for(hidden_states, down_proj, order.row_slot.numel())
    # Tuning may have changed the tiles since the forward pass.
    metadata = RoutingMetadata(*order.tensors(), tiles_of(order.expert_start, tiles.block_m))
    call, step = Call(metadata, num_slots, tiles), None
    needs_scaled = needs_down or adapters.need_scaled_rows
    if adapters.down is not None:
        step = adapters.down.backward(grad_output, call, is_by_token=True)
    stack = dense(down_proj, metadata.expert_start)
    grad_h, scaled, partial = down_backward(
        grad_output, stack, preactivation, topk_weights, metadata, activation, tiles.down_backward, step, needs_scaled
    )
    del stack
    grad_gate_up = grad_down = grad_x = rows = None
    grad_bias = row_sums(grad_h, metadata) if needs_bias else None
    if needs_down and scaled is not None:
        grad_down = weight_gradient(grad_output, scaled, metadata, num_slots, tiles.weight_gradient, gather="left")
    step = None
    if adapters.gate_up is not None and (needs_x or adapters.gate_up.needs_a):
        step = adapters.gate_up.backward(grad_h, call, is_by_token=False)
    if has_adapters:
        adapters.fill_gradients(grad_output, scaled, grad_h, hidden_states, topk_weights, call)
    del scaled
    if needs_x:
        stack, tile = dense(gate_up_proj, metadata.expert_start), tiles.input_gradient
        if num_slots == 1:
            grad_x = grouped_gemm_by_slot(grad_h, stack, metadata, tile, None, transpose=False, low_rank=step)
        else:
            rows = grouped_gemm(grad_h, stack, metadata, tile, transpose=False, low_rank=step)
        del stack
    summed, grad_weights = combine_gradients(rows, metadata.slot_row, topk_weights, partial if needs_weights else None)
    grad_x = summed if grad_x is None else grad_x
    del rows, partial, summed
    if needs_gate_up:
        grad_gate_up = weight_gradient(
            grad_h, hidden_states, metadata, num_slots, tiles.weight_gradient, gather="right"
        )
    sources = (hidden_states, gate_up_proj, down_proj, topk_weights, hidden_states)
    grads = (grad_x, grad_gate_up, grad_down, grad_weights, grad_bias)
    return tuple(s.new_empty(0) if g is None else g for s, g in zip(sources, grads, strict=True))


def _check_sizes(topk_indices: Tensor, gate_up_proj: Tensor | PackedMatrices) -> None:
    """Slots are numbered in 32 bits, and experts along a grid axis of 16."""
    if topk_indices.numel() >= 2**31:
        raise ValueError(f"topk_indices: got {topk_indices.numel()} slots, expected fewer than {2**31}")
    if gate_up_proj.shape[0] >= 2**16:
        raise ValueError(f"gate_up_proj: got {gate_up_proj.shape[0]} experts, expected fewer than {2**16}")


def tiles_for(hidden_states: Tensor, down_proj: Tensor | PackedMatrices, num_rows: int) -> Tiles:
    """Return the tiles of a call.

    Args:
        hidden_states: [T, H].
        down_proj: [E, H, I].
        num_rows: S.
    """
    num_experts, hidden, width = down_proj.shape
    bucket = row_bucket(num_rows, num_experts)
    return choose_tiles(hidden_states.device, hidden, width, bucket, hidden_states.dtype)
