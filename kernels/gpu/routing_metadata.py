"""Which rows each expert gets: a stable sort of the slots by expert, on the device, without asking the host.

Every grouped kernel reads the result. A slot is one (token, choice) pair, number ``t * K + k``; a row is a slot's
place once the used slots are sorted by expert. Surprising: nothing here depends on the order in which blocks run. Each
block counts its own slots, a prefix sum over blocks gives it its own stretch of every expert's rows, and within the
block per slot's rank is the number of earlier slots with the same expert, so the result equals a stable argsort.

    ids      [2 0 | 0 9 | 2 0]  E=3, blocks of two, 9 is unused
    counts    e0: 1 1 1   e2: 1 0 1                    count_slots
    first     e0: 0 1 2   e2: 0 1 1  totals 3 0 2      sum_blocks
    start    [0 3 3 5]                                 sum_experts
    row       3 0   1 -   4 2                          place_slots
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.triton_numerics import LAUNCH
from deepseek_kernels.slot_order import SlotOrder

SLOT_BLOCK = 128
PREFIX_BLOCK = 1024


@dataclass
class RoutingMetadata(SlotOrder):
    """The sorted order of the slots, and where each expert's tiles begin.

    Attributes:
        tile_start: First tile of `block_m` rows of each expert, then the number of tiles. [E + 1] int32.
    """

    tile_start: Tensor


def max_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """Return an upper bound of the number of tiles that the host knows without asking the device.

    Args:
        num_rows: S.
        num_experts: E.
        block_m: Rows a tile.
    """
    return num_rows // block_m + min(num_experts, num_rows)


def routing_metadata(topk_indices: Tensor, num_experts: int, block_m: int) -> RoutingMetadata:
    """Sort the slots by expert with four small kernels.

    Args:
        topk_indices: [T, K] int32 or int64; negative or at least `num_experts` means unused.
        num_experts: E.
        block_m: Rows a tile.
    """
    num_slots, device = topk_indices.numel(), topk_indices.device
    num_blocks = max(1, triton.cdiv(num_slots, SLOT_BLOCK))
    bins = triton.next_power_of_2(num_experts + 1)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    block_first, totals = integers(num_blocks, bins), integers(bins)
    order = SlotOrder.empty_like(topk_indices, num_slots, num_experts)
    metadata = RoutingMetadata(*order.tensors(), integers(num_experts + 1))
    count_slots_kernel[(num_blocks,)](topk_indices, block_first, num_slots, num_experts, bins, SLOT_BLOCK, **LAUNCH)
    sum_blocks_kernel[(num_experts,)](block_first, totals, num_blocks, bins, PREFIX_BLOCK, **LAUNCH)
    sum_experts_kernel[(1,)](
        totals,
        metadata.expert_start,
        metadata.tile_start,
        num_experts,
        triton.next_power_of_2(num_experts),
        block_m,
        **LAUNCH,
    )
    place_slots_kernel[(num_blocks,)](
        topk_indices,
        block_first,
        metadata.expert_start,
        metadata.row_slot,
        metadata.slot_row,
        num_slots,
        num_experts,
        bins,
        SLOT_BLOCK,
        **LAUNCH,
    )
    return metadata


def tiles_of(expert_start: Tensor, block_m: int) -> Tensor:
    """Return `tile_start` for tiles of `block_m` rows; the backward pass need not use the forward pass's tiles.

    Args:
        expert_start: [E + 1] int32.
        block_m: Rows a tile.
    """
    num_experts, tile_start = expert_start.numel() - 1, torch.empty_like(expert_start)
    count_tiles_kernel[(1,)](
        expert_start, tile_start, num_experts, BINS=triton.next_power_of_2(num_experts), BLOCK_M=block_m, **LAUNCH
    )
    return tile_start


def routing_metadata_reference(topk_indices: Tensor, num_experts: int, block_m: int) -> RoutingMetadata:
    """Return the same by torch's stable sort; `row_slot` is -1 beyond the used rows.

    Args:
        topk_indices: [T, K].
        num_experts: E.
        block_m: Rows a tile.
    """
    ids = topk_indices.reshape(-1).long()
    ids = torch.where((ids < 0) | (ids > num_experts), num_experts, ids)
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    used = int(counts.sum())
    row_slot, slot_row = torch.full_like(ids, -1), torch.full_like(ids, -1)
    row_slot[:used] = order[:used]
    slot_row[order[:used]] = torch.arange(used, device=ids.device)
    starts = (torch.cat([counts[:0], counts.new_zeros(1), n.cumsum(0)]) for n in (counts, -(-counts // block_m)))
    return RoutingMetadata(*(t.int() for t in (row_slot, slot_row, *starts)))


@triton.jit
def _load_ids(ids_ptr, slots, num_slots, num_experts):
    """Experts of these slots; `num_experts` for unused ones and beyond the end."""
    ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=num_experts).to(tl.int64)
    return tl.where((ids < 0) | (ids > num_experts), num_experts, ids).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots"])
def count_slots_kernel(
    ids_ptr, counts_ptr, num_slots, num_experts: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write one block's number of slots per expert to ``counts[block, :]``."""
    block = tl.program_id(0).to(tl.int64)
    ids = _load_ids(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), num_slots, num_experts)
    tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), tl.histogram(ids, BINS))


@triton.jit(do_not_specialize=["num_blocks"])
def sum_blocks_kernel(counts_ptr, totals_ptr, num_blocks, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Turn one expert's counts per block into their exclusive prefix sum, in place, and write the total."""
    expert = tl.program_id(0)
    carried = 0
    for first in range(0, num_blocks, BLOCK):
        blocks = first + tl.arange(0, BLOCK)
        pointers = counts_ptr + blocks.to(tl.int64) * BINS + expert
        counts = tl.load(pointers, mask=blocks < num_blocks, other=0)
        tl.store(pointers, carried + tl.cumsum(counts, 0) - counts, mask=blocks < num_blocks)
        carried += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, carried)


@triton.jit
def sum_experts_kernel(
    totals_ptr, expert_start_ptr, tile_start_ptr, num_experts: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Write each expert's first row and first tile, with the ends behind the last."""
    experts = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + experts, mask=experts < num_experts, other=0)
    tiles = (totals + BLOCK_M - 1) // BLOCK_M
    tl.store(expert_start_ptr, 0)
    tl.store(tile_start_ptr, 0)
    tl.store(expert_start_ptr + 1 + experts, tl.cumsum(totals, 0), mask=experts < num_experts)
    tl.store(tile_start_ptr + 1 + experts, tl.cumsum(tiles, 0), mask=experts < num_experts)


@triton.jit
def count_tiles_kernel(
    expert_start_ptr, tile_start_ptr, num_experts: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Write each expert's first tile, with the end behind the last, for experts whose first rows are known."""
    experts = tl.arange(0, BINS)
    is_expert = experts < num_experts
    first = tl.load(expert_start_ptr + experts, mask=is_expert, other=0)
    end = tl.load(expert_start_ptr + 1 + experts, mask=is_expert, other=0)
    tl.store(tile_start_ptr, 0)
    tl.store(tile_start_ptr + 1 + experts, tl.cumsum((end - first + BLOCK_M - 1) // BLOCK_M, 0), mask=is_expert)


@triton.jit(do_not_specialize=["num_slots"])
def place_slots_kernel(
    ids_ptr,
    block_first_ptr,
    expert_start_ptr,
    row_slot_ptr,
    slot_row_ptr,
    num_slots,
    num_experts: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Give every slot of a block its row: expert's start + block's first + rank within the block."""
    block = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    slots = block * BLOCK + places
    ids = _load_ids(ids_ptr, slots, num_slots, num_experts)
    # The same ids laid out along the other axis, read again: a transposition in registers costs more.
    others = _load_ids(ids_ptr, block * BLOCK + places, num_slots, num_experts)
    is_earlier = (ids[:, None] == others[None, :]) & (places[:, None] > places[None, :])
    rank = tl.sum(is_earlier.to(tl.int32), 1)
    is_used = (slots < num_slots) & (ids < num_experts)
    first = tl.load(block_first_ptr + block * BINS + ids, mask=is_used, other=0)
    row = tl.load(expert_start_ptr + ids, mask=is_used, other=0) + first + rank
    tl.store(row_slot_ptr + row, slots.to(tl.int32), mask=is_used)
    tl.store(slot_row_ptr + slots, tl.where(is_used, row, -1), mask=slots < num_slots)


@triton.jit
def find_tile(
    tile_start_ptr,
    expert_start_ptr,
    pid,
    num_tiles_bound,
    num_blocks_n,
    num_experts,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Which expert, rows and column block program `pid` has; no rows (``first == end``) beyond the last tile.

    Programs walk `GROUP_M` row tiles down before the next column block, so that one expert's rows and weights stay in
    the L2 cache.
    """
    per_group = GROUP_M * num_blocks_n
    group = pid // per_group
    height = min(num_tiles_bound - group * GROUP_M, GROUP_M)
    tile = group * GROUP_M + (pid % per_group) % height
    block_n = (pid % per_group) // height
    experts = tl.arange(0, EXPERTS)
    ends = tl.load(tile_start_ptr + 1 + experts, mask=experts < num_experts, other=2147483647)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    is_tile = expert < num_experts
    expert = min(expert, num_experts - 1)
    first = tl.load(expert_start_ptr + expert)
    end = tl.load(expert_start_ptr + expert + 1)
    first += (tile - tl.load(tile_start_ptr + expert)) * BLOCK_M
    end = tl.where(is_tile, min(end, first + BLOCK_M), first)
    return expert.to(tl.int64), first.to(tl.int64), end.to(tl.int64), block_n
