"""Back through down projection and activation: from the output's gradient to that of the pre-activation.

The first backward kernel. Per row r with token t, expert e and router weight s, and ``a = act(gate) * up``:

    da = grad_output[t] @ W_down[e]                   the product; rows of grad_output gathered by pointer
    grad_s = <da, a>                                  partial sums per column block, summed by `combine_gradients`
    scaled_a = s * a                                  what the gradient of W_down multiplies
    grad_gate = s * da * up * act'(gate);  grad_up = s * da * act(gate)

Surprising: neither a nor the experts' outputs were kept. The router's gradient needs y only as <grad_output, y>, which
equals <da, a>, and a is recomputed from h here, where h is being read anyway.

S rows, H hidden, I expert width, E experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.gpu.launch import ceil_div, launch
from deepseek_kernels.gpu.low_rank_step import LowRankStep, add_low_rank, step_constants, step_operands
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, find_tile, max_tiles
from deepseek_kernels.gpu.tiles import Tile, matmul_precision
from deepseek_kernels.gpu.triton_epilogue import backward_tile, epilogue_constants, gated_slopes, through_clamp
from deepseek_kernels.gpu.triton_numerics import TRITON_DTYPES, accumulator, multiply, narrow
from deepseek_kernels.gpu.weight_blocks import load_block, load_rows, weight_operand


def down_backward(
    grad_output: Tensor,
    down_proj: Tensor,
    preactivation: Tensor,
    topk_weights: Tensor,
    metadata: RoutingMetadata,
    activation: str,
    tile: Tile,
    low_rank: LowRankStep | None = None,
    needs_scaled: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the pre-activation's gradient [S, 2I], the scaled activation [S, I] and the router weights' gradient.

    Args:
        grad_output: [T, H].
        down_proj: [E, H, I].
        preactivation: [S, 2I].
        topk_weights: [T, K].
        metadata: From `routing_metadata` with the tile's `block_m`.
        activation: Text of the epilogue.
        tile: Sizes of the tiles.
        low_rank: What an adapter adds to da; its factor is [E, r, I].
        needs_scaled: Whether the second result is wanted; it is None otherwise.

    Returns:
        The third is [P, S], to be summed over P (`combine_gradients` does), in fp32 (fp64 for fp64), undefined beyond
        the used rows.
    """
    num_rows, (num_experts, hidden, width) = metadata.row_slot.numel(), down_proj.shape
    tile = backward_tile(tile, activation)
    blocks = ceil_div(width, tile.block_n)
    grad_h = torch.empty_like(preactivation)
    scaled = preactivation.new_empty(num_rows, width) if needs_scaled else None
    wide = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    partial = preactivation.new_empty(blocks, num_rows, dtype=wide)
    tiles = max_tiles(num_rows, num_experts, tile.block_m)
    weights = weight_operand(down_proj, tile, tile.block_k, tile.block_n)
    if tiles:
        order = (metadata.row_slot, metadata.expert_start, metadata.tile_start)
        inputs = (grad_output, weights, preactivation, topk_weights)
        launch(
            down_backward_kernel,
            (tiles * blocks,),
            (*inputs, grad_h, scaled, partial, *order, tiles, num_rows, *step_operands(low_rank)),
            down_backward_constants,
            grad_output.dtype,
            num_experts,
            hidden,
            width,
            topk_weights.shape[1],
            activation=activation,
            tile=tile,
            is_descriptor=weights is not down_proj,
            rank=0 if low_rank is None else low_rank.rank,
            precision=matmul_precision(grad_output.dtype),
        )
    return grad_h, scaled, partial


def down_backward_constants(
    dtype: torch.dtype,
    num_experts: int,
    hidden: int,
    width: int,
    num_slots: int,
    *,
    activation: str,
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
        "DESCRIPTOR": is_descriptor,
        "DTYPE": TRITON_DTYPES[dtype],
        "ACC": accumulator(dtype),
        "PRECISION": precision or matmul_precision(dtype),
        **tile.constants,
        **step_constants(rank),
    }


def down_backward_reference(
    grad_output: Tensor,
    down_proj: Tensor,
    preactivation: Tensor,
    row_weight: Tensor,
    row_token: Tensor,
    row_expert: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same by torch's autograd, for rows of known token, expert and router weight.

    Args:
        grad_output: [T, H].
        down_proj: [E, H, I].
        preactivation: [R, 2I].
        row_weight: [R].
        row_token: [R].
        row_expert: [R].
        activation: Text of the epilogue.
    """
    h, s = preactivation.detach().requires_grad_(), row_weight.detach().requires_grad_()
    with torch.enable_grad():
        scaled = s.unsqueeze(1) * Epilogue.read(activation).apply(h)
        y = (down_proj[row_expert] @ scaled.unsqueeze(-1)).squeeze(-1)
        grad_h, grad_s = torch.autograd.grad(y, (h, s), grad_output[row_token])
    return grad_h, scaled.detach(), grad_s


@triton.jit(do_not_specialize=["num_tiles_bound", "num_rows"])
def down_backward_kernel(
    grad_ptr,
    weight_ptr,
    preactivation_ptr,
    topk_weights_ptr,
    grad_h_ptr,
    scaled_ptr,
    partial_ptr,
    row_slot_ptr,
    expert_start_ptr,
    tile_start_ptr,
    num_tiles_bound,
    num_rows,
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
    """One tile of `BLOCK_M` rows of one expert by `BLOCK_N` columns of the expert's width."""
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
    slots = tl.load(row_slot_ptr + rows, mask=is_row, other=0)
    tokens = (slots // SLOTS).to(tl.int64)
    grad_ptrs = grad_ptr + tokens[:, None] * HIDDEN + inner[None, :]
    grad_a = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if DESCRIPTOR:
        for k in range(0, HIDDEN, BLOCK_K):
            grad = load_rows(grad_ptrs, inner < HIDDEN - k, HIDDEN % BLOCK_K == 0)
            weight = load_block(weight_ptr, expert, k, block_n * BLOCK_N, BLOCK_K, BLOCK_N)
            grad_a = multiply(grad, weight, grad_a, ACC, PRECISION)
            grad_ptrs += BLOCK_K
    else:
        weight_ptrs = weight_ptr + expert * HIDDEN * WIDTH + inner[:, None].to(tl.int64) * WIDTH + columns[None, :]
        for k in range(0, HIDDEN, BLOCK_K):
            is_inner = inner < HIDDEN - k
            grad = tl.load(grad_ptrs, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=is_inner[:, None] & is_column[None, :], other=0.0)
            grad_a = multiply(grad, weight, grad_a, ACC, PRECISION)
            grad_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K * WIDTH
    if RANK > 0:
        grad_a = add_low_rank(
            grad_a,
            low_ptr,
            factor_ptr,
            expert,
            first,
            is_row,
            columns,
            is_column,
            WIDTH,
            False,
            RANK,
            BLOCK_R,
            ACC,
            PRECISION,
        )

    scale = tl.load(topk_weights_ptr + slots, mask=is_row, other=0.0).to(ACC)
    # Offsets within the tile fit 32 bits; only the tile's own place needs 64.
    scaled_tile_ptr = None if scaled_ptr is None else scaled_ptr + first * WIDTH
    partial = store_tile(
        grad_a,
        scale,
        preactivation_ptr + first * 2 * WIDTH,
        grad_h_ptr + first * 2 * WIDTH,
        scaled_tile_ptr,
        (end - first).to(tl.int32),
        block_n * BLOCK_N,
        WIDTH,
        ACTIVATION,
        LIMIT,
        ALPHA,
        SHIFT,
        INTERLEAVED,
        DTYPE,
        ACC,
        BLOCK_M,
        BLOCK_N,
    )
    tl.store(partial_ptr + block_n.to(tl.int64) * num_rows + rows, partial, mask=is_row)


@triton.jit
def store_tile(
    grad_a,
    scale,
    h_tile_ptr,
    grad_h_tile_ptr,
    scaled_tile_ptr,
    num_tile_rows,
    first_column,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write both results of a tile, from the activation's gradient; return the router's part of it for each row."""
    local = tl.arange(0, BLOCK_M)
    partial = tl.zeros((BLOCK_M,), dtype=ACC)
    # In one piece this needs over 255 registers on sm_90 from 64 columns on, and spills; in quarters or halves it
    # does not.
    QUARTER: tl.constexpr = BLOCK_N // 4
    if BLOCK_N >= 32:
        left, right = column_halves(grad_a, BLOCK_M, BLOCK_N)
        first_quarter, second_quarter = column_halves(left, BLOCK_M, BLOCK_N // 2)
        third_quarter, fourth_quarter = column_halves(right, BLOCK_M, BLOCK_N // 2)
        for quarter in tl.static_range(4):
            if quarter == 0:
                piece = first_quarter
            elif quarter == 1:
                piece = second_quarter
            elif quarter == 2:
                piece = third_quarter
            else:
                piece = fourth_quarter
            partial += _store_columns(
                piece,
                scale,
                h_tile_ptr,
                grad_h_tile_ptr,
                scaled_tile_ptr,
                local,
                num_tile_rows,
                first_column + quarter * QUARTER + tl.arange(0, QUARTER),
                WIDTH,
                ACTIVATION,
                LIMIT,
                ALPHA,
                SHIFT,
                INTERLEAVED,
                DTYPE,
                ACC,
            )
    else:
        partial += _store_columns(
            grad_a,
            scale,
            h_tile_ptr,
            grad_h_tile_ptr,
            scaled_tile_ptr,
            local,
            num_tile_rows,
            first_column + tl.arange(0, BLOCK_N),
            WIDTH,
            ACTIVATION,
            LIMIT,
            ALPHA,
            SHIFT,
            INTERLEAVED,
            DTYPE,
            ACC,
        )
    return partial


@triton.jit
def column_halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _store_columns(
    grad_a,
    scale,
    h_ptr,
    grad_h_ptr,
    scaled_ptr,
    rows,
    num_rows,
    columns,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write the results for some columns of a tile and return their part of the router's gradient per row."""
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    if INTERLEAVED:
        places, UP = 2 * columns, 1
    else:
        places, UP = columns, WIDTH
    offsets = rows[:, None] * (2 * WIDTH) + places[None, :]
    gate = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(ACC)
    whole_up = tl.load(h_ptr + offsets + UP, mask=mask, other=0.0).to(ACC)
    activated, slope, up = gated_slopes(gate, whole_up, ACTIVATION, LIMIT, ALPHA, SHIFT)
    partial = tl.sum(grad_a * activated * up, 1)
    grad_a *= scale[:, None]
    tl.store(grad_h_ptr + offsets, narrow(grad_a * up * slope, DTYPE), mask=mask)
    tl.store(grad_h_ptr + offsets + UP, narrow(through_clamp(grad_a * activated, whole_up, LIMIT), DTYPE), mask=mask)
    if scaled_ptr is not None:
        scaled = scale[:, None] * activated * up
        tl.store(scaled_ptr + rows[:, None] * WIDTH + columns[None, :], narrow(scaled, DTYPE), mask=mask)
    return partial
