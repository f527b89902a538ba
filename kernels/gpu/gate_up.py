"""Gather, both up projections and the activation in one kernel: ``a = act(x W_gate^T) * (x W_up^T)``.

The first of the forward kernels. Rows of x are gathered by pointer while the product runs, so the gathered copy
[S, H] is never made; when training, the pre-activation h = [gate, up] is written as well, the only [S, .] tensor kept.

S rows, H hidden, I expert width, E experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.activations import apply_activation
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, find_tile, max_tiles
from deepseek_kernels.gpu.tiles import Tile, matmul_precision
from deepseek_kernels.gpu.triton_numerics import LAUNCH, TRITON_DTYPES, accumulator, activate, multiply, narrow
from deepseek_kernels.gpu.weight_blocks import load_block, load_rows, weight_operand


def gate_up(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    metadata: RoutingMetadata,
    num_slots_per_token: int,
    activation: str,
    keep_preactivation: bool,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Return the activated rows [S, I] and the pre-activation [S, 2I] (empty unless kept).

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        metadata: From `routing_metadata` with the tile's `block_m`.
        num_slots_per_token: K.
        activation: Canonical name.
        keep_preactivation: Whether to write h.
        tile: Sizes of the tiles.
    """
    num_rows, (num_experts, double_width, hidden) = metadata.row_slot.numel(), gate_up_proj.shape
    width = double_width // 2
    activated = hidden_states.new_empty(num_rows, width)
    preactivation = hidden_states.new_empty(num_rows if keep_preactivation else 0, double_width)
    tiles = max_tiles(num_rows, num_experts, tile.block_m)
    weights = weight_operand(gate_up_proj, tile, tile.block_n, tile.block_k)
    if tiles:
        gate_up_kernel[(tiles * triton.cdiv(width, tile.block_n),)](
            hidden_states,
            weights,
            activated,
            preactivation,
            metadata.row_slot,
            metadata.expert_start,
            metadata.tile_start,
            tiles,
            **gate_up_constants(
                hidden_states.dtype,
                num_experts,
                hidden,
                width,
                num_slots_per_token,
                activation=activation,
                keep_preactivation=keep_preactivation,
                tile=tile,
                is_descriptor=weights is not gate_up_proj,
            ),
            **tile.launch_options,
            **LAUNCH,
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
) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        "num_experts": num_experts,
        "HIDDEN": hidden,
        "WIDTH": width,
        "SLOTS": num_slots,
        "EXPERTS": triton.next_power_of_2(num_experts),
        "ACTIVATION": activation,
        "KEEP": keep_preactivation,
        "DESCRIPTOR": is_descriptor,
        "DTYPE": TRITON_DTYPES[dtype],
        "ACC": accumulator(dtype),
        "PRECISION": matmul_precision(dtype),
        **tile.constants,
    }


def gate_up_reference(
    hidden_states: Tensor, gate_up_proj: Tensor, row_token: Tensor, row_expert: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return activated rows and pre-activation, row by row, for rows of known token and expert.

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        row_token: Token of each row.
        row_expert: Expert of each row.
        activation: Canonical name.
    """
    h = (gate_up_proj[row_expert] @ hidden_states[row_token].unsqueeze(-1)).squeeze(-1)
    gate, up = h.chunk(2, dim=-1)
    return apply_activation(gate, activation) * up, h


@triton.jit(do_not_specialize=["num_tiles_bound"])
def gate_up_kernel(
    x_ptr,
    weight_ptr,
    activated_ptr,
    preactivation_ptr,
    row_slot_ptr,
    expert_start_ptr,
    tile_start_ptr,
    num_tiles_bound,
    num_experts: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
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
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if DESCRIPTOR:
        first_column = block_n * BLOCK_N
        for k in range(0, HIDDEN, BLOCK_K):
            x = load_rows(x_ptrs, inner < HIDDEN - k, HIDDEN % BLOCK_K == 0)
            gate_weight = load_block(weight_ptr, expert, first_column, k, BLOCK_N, BLOCK_K)
            gate = multiply(x, gate_weight.T, gate, ACC, PRECISION)
            up_weight = load_block(weight_ptr, expert, first_column + WIDTH, k, BLOCK_N, BLOCK_K)
            up = multiply(x, up_weight.T, up, ACC, PRECISION)
            x_ptrs += BLOCK_K
    else:
        weight_rows = expert * 2 * WIDTH + columns
        gate_ptrs = weight_ptr + weight_rows[None, :] * HIDDEN + inner[:, None]
        up_ptrs = weight_ptr + (weight_rows + WIDTH)[None, :] * HIDDEN + inner[:, None]
        for k in range(0, HIDDEN, BLOCK_K):
            is_inner = inner < HIDDEN - k
            x = tl.load(x_ptrs, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            is_weight = is_inner[:, None] & is_column[None, :]
            gate = multiply(x, tl.load(gate_ptrs, mask=is_weight, other=0.0), gate, ACC, PRECISION)
            up = multiply(x, tl.load(up_ptrs, mask=is_weight, other=0.0), up, ACC, PRECISION)
            x_ptrs += BLOCK_K
            gate_ptrs += BLOCK_K
            up_ptrs += BLOCK_K
    is_output = is_row[:, None] & is_column[None, :]
    # Rounded whether kept or not: the forward pass gives the same bits with gradients and without.
    gate = narrow(gate, DTYPE)
    up = narrow(up, DTYPE)
    if KEEP:
        h_ptrs = preactivation_ptr + rows[:, None] * 2 * WIDTH + columns[None, :]
        tl.store(h_ptrs, gate, mask=is_output)
        tl.store(h_ptrs + WIDTH, up, mask=is_output)
    activated, _ = activate(gate.to(ACC), ACTIVATION)
    activated = narrow(activated * up.to(ACC), DTYPE)
    tl.store(activated_ptr + rows[:, None] * WIDTH + columns[None, :], activated, mask=is_output)
