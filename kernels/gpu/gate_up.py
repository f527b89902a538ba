"""Gather, both up projections and the activation in one kernel: ``a = act(x W_gate^T) * (x W_up^T)``.

The first of the forward kernels. Rows of x are gathered by pointer while the product runs, so the gathered copy
[S, H] is never made. When training, the pre-activation h is written as well, the only [S, .] tensor kept; its columns
have the order of the rows of the weights.

S rows, H hidden, I expert width, E experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.gpu.launch import ceil_div, launch
from deepseek_kernels.gpu.low_rank_step import LowRankStep, add_low_rank, step_constants, step_operands
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, find_tile, max_tiles
from deepseek_kernels.gpu.tiles import Tile, matmul_precision
from deepseek_kernels.gpu.triton_epilogue import epilogue_constants, forward_tile, gated
from deepseek_kernels.gpu.triton_numerics import TRITON_DTYPES, accumulator, multiply, narrow
from deepseek_kernels.gpu.weight_blocks import load_block, load_rows, weight_operand


def gate_up(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    metadata: RoutingMetadata,
    num_slots_per_token: int,
    activation: str,
    keep_preactivation: bool,
    tile: Tile,
    bias: Tensor | None = None,
    low_rank: LowRankStep | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the activated rows [S, I] and the pre-activation [S, 2I] (empty unless kept).

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        metadata: From `routing_metadata` with the tile's `block_m`.
        num_slots_per_token: K.
        activation: Text of the epilogue.
        keep_preactivation: Whether to write h.
        tile: Sizes of the tiles.
        bias: [E, 2I].
        low_rank: What an adapter adds before the activation; its factor is [E, 2I, r].
    """
    num_rows, (num_experts, double_width, hidden) = metadata.row_slot.numel(), gate_up_proj.shape
    width = double_width // 2
    activated = hidden_states.new_empty(num_rows, width)
    preactivation = hidden_states.new_empty(num_rows if keep_preactivation else 0, double_width)
    tiles = max_tiles(num_rows, num_experts, tile.block_m)
    # Of interleaved rows a gate and its up stand side by side in one row of twice the length.
    is_interleaved = Epilogue.read(activation).is_interleaved
    matrices = gate_up_proj.view(num_experts, width, 2 * hidden) if is_interleaved else gate_up_proj
    tile = forward_tile(tile, activation)
    weights = weight_operand(matrices, tile, tile.block_n, tile.block_k)
    if tiles:
        order = (metadata.row_slot, metadata.expert_start, metadata.tile_start)
        launch(
            gate_up_kernel,
            (tiles * ceil_div(width, tile.block_n),),
            (hidden_states, weights, bias, activated, preactivation, *order, tiles, *step_operands(low_rank)),
            gate_up_constants,
            hidden_states.dtype,
            num_experts,
            hidden,
            width,
            num_slots_per_token,
            activation=activation,
            keep_preactivation=keep_preactivation,
            tile=tile,
            is_descriptor=isinstance(weights, TensorDescriptor),
            rank=0 if low_rank is None else low_rank.rank,
            precision=matmul_precision(hidden_states.dtype),
        )
    return activated, preactivation


def gate_up_constants(
    dtype: torch.dtype,
    num_experts: int,
    hidden: int,
    width: int,
    num_slots: int,
    *,
    activation: str,
    keep_preactivation: bool,
    tile: Tile,
    is_descriptor: bool = False,
    rank: int = 0,
    precision: str | None = None,
) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        "num_experts": num_experts,
        "HIDDEN": hidden,
        "WIDTH": width,
        "SLOTS": num_slots,
        "EXPERTS": triton.next_power_of_2(num_experts),
        **epilogue_constants(activation),
        "KEEP": keep_preactivation,
        "DESCRIPTOR": is_descriptor,
        "DTYPE": TRITON_DTYPES[dtype],
        "ACC": accumulator(dtype),
        "PRECISION": precision or matmul_precision(dtype),
        **tile.constants,
        **step_constants(rank),
    }


def gate_up_reference(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    row_token: Tensor,
    row_expert: Tensor,
    activation: str,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return activated rows and pre-activation, row by row, for rows of known token and expert.

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        row_token: Token of each row.
        row_expert: Expert of each row.
        activation: Text of the epilogue.
        bias: [E, 2I].
    """
    h = (gate_up_proj[row_expert] @ hidden_states[row_token].unsqueeze(-1)).squeeze(-1)
    h = h if bias is None else h + bias[row_expert]
    return Epilogue.read(activation).apply(h), h


@triton.jit(do_not_specialize=["num_tiles_bound"])
def gate_up_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    activated_ptr,
    preactivation_ptr,
    row_slot_ptr,
    expert_start_ptr,
    tile_start_ptr,
    num_tiles_bound,
    low_ptr,
    factor_ptr,
    num_experts: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KEEP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of `BLOCK_M` rows of one expert by `BLOCK_N` columns of gate and of up."""
    expert, first, end, block_n = find_tile(
        tile_start_ptr,
        expert_start_ptr,
        tl.program_id(0),
        num_tiles_bound,
        tl.cdiv(WIDTH, BLOCK_N),
        num_experts,
        EXPERTS,
        BLOCK_M,
        GROUP_M,
    )
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    is_row, is_column = rows < end, columns < WIDTH
    tokens = (tl.load(row_slot_ptr + rows, mask=is_row, other=0) // SLOTS).to(tl.int64)
    x_ptrs = x_ptr + tokens[:, None] * HIDDEN + inner[None, :]
    # Where the rows of up lie behind those of gate, and their columns in h.
    if INTERLEAVED:
        places, UP = 2 * columns, 1
    else:
        places, UP = columns, WIDTH
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if bias_ptr is not None:  # before the products: behind them it would cost registers
        bias_ptrs = bias_ptr + expert * 2 * WIDTH + places
        gate += tl.load(bias_ptrs, mask=is_column, other=0.0).to(ACC)[None, :]
        up += tl.load(bias_ptrs + UP, mask=is_column, other=0.0).to(ACC)[None, :]
    if DESCRIPTOR:
        first_column = block_n * BLOCK_N
        for k in range(0, HIDDEN, BLOCK_K):
            x = load_rows(x_ptrs, inner < HIDDEN - k, HIDDEN % BLOCK_K == 0)
            gate_weight = load_block(weight_ptr, expert, first_column, k, BLOCK_N, BLOCK_K)
            gate = multiply(x, gate_weight.T, gate, ACC, PRECISION)
            if INTERLEAVED:
                up_weight = load_block(weight_ptr, expert, first_column, k + HIDDEN, BLOCK_N, BLOCK_K)
            else:
                up_weight = load_block(weight_ptr, expert, first_column + WIDTH, k, BLOCK_N, BLOCK_K)
            up = multiply(x, up_weight.T, up, ACC, PRECISION)
            x_ptrs += BLOCK_K
    else:
        weight_rows = expert * 2 * WIDTH + places
        gate_ptrs = weight_ptr + weight_rows[None, :] * HIDDEN + inner[:, None]
        up_ptrs = weight_ptr + (weight_rows + UP)[None, :] * HIDDEN + inner[:, None]
        for k in range(0, HIDDEN, BLOCK_K):
            is_inner = inner < HIDDEN - k
            x = tl.load(x_ptrs, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            is_weight = is_inner[:, None] & is_column[None, :]
            gate = multiply(x, tl.load(gate_ptrs, mask=is_weight, other=0.0), gate, ACC, PRECISION)
            up = multiply(x, tl.load(up_ptrs, mask=is_weight, other=0.0), up, ACC, PRECISION)
            x_ptrs += BLOCK_K
            gate_ptrs += BLOCK_K
            up_ptrs += BLOCK_K
    if RANK > 0:
        gate = add_low_rank(
            gate,
            low_ptr,
            factor_ptr,
            expert,
            first,
            is_row,
            places,
            is_column,
            2 * WIDTH,
            True,
            RANK,
            BLOCK_R,
            ACC,
            PRECISION,
        )
        up = add_low_rank(
            up,
            low_ptr,
            factor_ptr,
            expert,
            first,
            is_row,
            places + UP,
            is_column,
            2 * WIDTH,
            True,
            RANK,
            BLOCK_R,
            ACC,
            PRECISION,
        )
    is_output = is_row[:, None] & is_column[None, :]
    # Rounded whether kept or not: the forward pass gives the same bits with gradients and without.
    gate = narrow(gate, DTYPE)
    up = narrow(up, DTYPE)
    if KEEP:
        h_ptrs = preactivation_ptr + rows[:, None] * 2 * WIDTH + places[None, :]
        tl.store(h_ptrs, gate, mask=is_output)
        tl.store(h_ptrs + UP, up, mask=is_output)
    activated = narrow(gated(gate, up, ACTIVATION, LIMIT, ALPHA, SHIFT, ACC), DTYPE)
    tl.store(activated_ptr + rows[:, None] * WIDTH + columns[None, :], activated, mask=is_output)
