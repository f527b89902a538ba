"""The experts' two products with 4-bit weights (W4A16) for few rows per expert: `gate_up`, `grouped_gemm` on codes.

A step of the inner loop loads words of eight codes and their groups' scales, a quarter of what bf16 weights take, and
expands them in registers; all else is as in the dense kernels. For many rows expanding the same weights in every row
tile costs more than a dense copy (``four_bit_dequantize``).

S rows, H hidden, I expert width, E experts.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.four_bit import PackedMatrices
from deepseek_kernels.gpu.four_bit_codes import by_place, code_constants, load_weights, value_table, words_of
from deepseek_kernels.gpu.gate_up import gate_up_constants
from deepseek_kernels.gpu.grouped_gemm import grouped_gemm_constants
from deepseek_kernels.gpu.launch import launch
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, find_tile, max_tiles
from deepseek_kernels.gpu.tiles import Tile
from deepseek_kernels.gpu.triton_epilogue import gated
from deepseek_kernels.gpu.triton_numerics import multiply, narrow


def four_bit_gate_up(
    hidden_states: Tensor,
    gate_up_proj: PackedMatrices,
    metadata: RoutingMetadata,
    num_slots_per_token: int,
    activation: str,
    keep_preactivation: bool,
    tile: Tile,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the activated rows [S, I] and the pre-activation [S, 2I] (empty unless kept), as `gate_up` does.

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H]; `fits_products` holds.
        metadata: From `routing_metadata` with the tile's `block_m`.
        num_slots_per_token: K.
        activation: Text of the epilogue.
        keep_preactivation: Whether to write h.
        tile: Sizes of the tiles.
        bias: [E, 2I].
    """
    num_rows, (num_experts, double_width, hidden) = metadata.row_slot.numel(), gate_up_proj.shape
    width = double_width // 2
    activated = hidden_states.new_empty(num_rows, width)
    preactivation = hidden_states.new_empty(num_rows if keep_preactivation else 0, double_width)
    tiles = max_tiles(num_rows, num_experts, tile.block_m)
    if tiles:
        stack = (words_of(gate_up_proj), gate_up_proj.scales, value_table(gate_up_proj.device))
        order = (metadata.row_slot, metadata.expert_start, metadata.tile_start)
        launch(
            four_bit_gate_up_kernel,
            (tiles * triton.cdiv(width, tile.block_n),),
            (hidden_states, *stack, bias, activated, preactivation, *order, tiles),
            four_bit_gate_up_constants,
            hidden_states.dtype,
            num_experts,
            hidden,
            width,
            num_slots_per_token,
            form=gate_up_proj.format.name,
            group_size=gate_up_proj.format.group_size,
            activation=activation,
            keep_preactivation=keep_preactivation,
            tile=tile,
        )
    return activated, preactivation


def four_bit_gate_up_constants(*shape: Any, form: str, group_size: int, **settings: Any) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    constants = gate_up_constants(*shape, **settings)
    return {**_known_to(four_bit_gate_up_kernel, constants), **code_constants(form, group_size)}


def four_bit_gemm(rows: Tensor, weights: PackedMatrices, metadata: RoutingMetadata, tile: Tile) -> Tensor:
    """Return ``rows[r] @ weights[e]^T`` for every row r of expert e.

    Args:
        rows: [S, K], sorted by expert.
        weights: [E, N, K]; `fits_products` holds.
        metadata: From `routing_metadata` with the tile's `block_m`.
        tile: Sizes of the tiles.
    """
    num_rows, (num_experts, columns, _) = rows.shape[0], weights.shape
    output = rows.new_empty(num_rows, columns)
    tiles = max_tiles(num_rows, num_experts, tile.block_m)
    if tiles:
        stack = (words_of(weights), weights.scales, value_table(weights.device))
        launch(
            four_bit_gemm_kernel,
            (tiles * triton.cdiv(columns, tile.block_n),),
            (rows, *stack, output, metadata.expert_start, metadata.tile_start, tiles),
            four_bit_gemm_constants,
            rows.dtype,
            *weights.shape,
            form=weights.format.name,
            group_size=weights.format.group_size,
            tile=tile,
        )
    return output


def four_bit_gemm_constants(*shape: Any, form: str, group_size: int, tile: Tile) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    constants = grouped_gemm_constants(*shape, transpose=True, tile=tile)
    return {**_known_to(four_bit_gemm_kernel, constants), **code_constants(form, group_size)}


def _known_to(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of the dense kernel that this one has as well: descriptors and adapters it knows none."""
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


@triton.jit(do_not_specialize=["num_tiles_bound"])
def four_bit_gate_up_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    table_ptr,
    bias_ptr,
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
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KEEP: tl.constexpr,
    NF4: tl.constexpr,
    GROUP: tl.constexpr,
    PTX: tl.constexpr,
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
    # Where the rows of up lie behind those of gate, and their columns in h.
    if INTERLEAVED:
        places, UP = 2 * columns, 1
    else:
        places, UP = columns, WIDTH
    weight_rows = expert * 2 * WIDTH + places
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + weight_rows, mask=is_column, other=0.0).to(ACC)[None, :]
        up += tl.load(bias_ptr + weight_rows + UP, mask=is_column, other=0.0).to(ACC)[None, :]
    for k in range(0, HIDDEN, BLOCK_K):
        x = tl.load(x_ptrs, mask=is_row[:, None] & (inner < HIDDEN - k)[None, :], other=0.0)
        x = by_place(x, BLOCK_M, BLOCK_K)
        weight = load_weights(
            words_ptr, scales_ptr, table_ptr, weight_rows, is_column, k,
            HIDDEN, NF4, GROUP, PTX, DTYPE, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        gate = multiply(x, weight, gate, ACC, PRECISION)
        weight = load_weights(
            words_ptr, scales_ptr, table_ptr, weight_rows + UP, is_column, k,
            HIDDEN, NF4, GROUP, PTX, DTYPE, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        up = multiply(x, weight, up, ACC, PRECISION)
        x_ptrs += BLOCK_K
    is_output = is_row[:, None] & is_column[None, :]
    gate = narrow(gate, DTYPE)
    up = narrow(up, DTYPE)
    if KEEP:
        h_ptrs = preactivation_ptr + rows[:, None] * 2 * WIDTH + places[None, :]
        tl.store(h_ptrs, gate, mask=is_output)
        tl.store(h_ptrs + UP, up, mask=is_output)
    activated = narrow(gated(gate, up, ACTIVATION, LIMIT, ALPHA, SHIFT, ACC), DTYPE)
    tl.store(activated_ptr + rows[:, None] * WIDTH + columns[None, :], activated, mask=is_output)


@triton.jit(do_not_specialize=["num_tiles_bound"])
def four_bit_gemm_kernel(
    rows_ptr,
    words_ptr,
    scales_ptr,
    table_ptr,
    output_ptr,
    expert_start_ptr,
    tile_start_ptr,
    num_tiles_bound,
    num_experts: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    NF4: tl.constexpr,
    GROUP: tl.constexpr,
    PTX: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of `BLOCK_M` rows of one expert by `BLOCK_N` columns."""
    expert, first, end, block_n = find_tile(
        tile_start_ptr,
        expert_start_ptr,
        tl.program_id(0),
        num_tiles_bound,
        tl.cdiv(COLUMNS, BLOCK_N),
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
    is_row, is_column = rows < end, columns < COLUMNS
    row_ptrs = rows_ptr + rows[:, None] * INNER + inner[None, :]
    weight_rows = expert * COLUMNS + columns
    output = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in range(0, INNER, BLOCK_K):
        values = tl.load(row_ptrs, mask=is_row[:, None] & (inner < INNER - k)[None, :], other=0.0)
        values = by_place(values, BLOCK_M, BLOCK_K)
        weight = load_weights(
            words_ptr, scales_ptr, table_ptr, weight_rows, is_column, k,
            INNER, NF4, GROUP, PTX, DTYPE, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        output = multiply(values, weight, output, ACC, PRECISION)
        row_ptrs += BLOCK_K
    output_ptrs = output_ptr + rows[:, None] * COLUMNS + columns[None, :]
    tl.store(output_ptrs, narrow(output, DTYPE), mask=is_row[:, None] & is_column[None, :])
