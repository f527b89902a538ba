"""Which rows each expert gets: a stable sort of the slots by expert, on the device, without asking the host.

Every grouped kernel reads the result. A slot is one (token, choice) pair, number ``t * K + k``; a row is a slot's
place once the used slots are sorted by expert. Surprising: nothing here depends on the order in which programs run.
Each adds up the slots of all chunks before its own, which gives it its own stretch of every expert's rows; a slot's
rank there is the number of earlier slots with the same expert, so the result equals a stable argsort.

    ids      [2 0 | 0 9 | 2 0]  E=3, chunks of two, 9 is unused
    counts    e0: 1 1 1   e2: 1 0 1                    count_slots, left out where one chunk holds all slots
    first     e0: 0 1 2   e2: 0 1 1  totals 3 0 2      place_slots from here on
    start    [0 3 3 5]
    row       3 0   1 -   4 2
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.launch import launch
from deepseek_kernels.slot_order import SlotOrder

# Slots that are compared with one another; that are counted at once; that one program has, of few and of many: every
# program reads the counts of all.
SLOT_BLOCK = 128
COUNT_BLOCK = 1024
CHUNKS = (1024, 8192)
_MANY_SLOTS = 2**19


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


def routing_metadata(
    topk_indices: Tensor, num_experts: int, block_m: int, max_rows: int | None = None
) -> RoutingMetadata:
    """Sort the slots by expert: one small kernel for up to 1024 of them, two for more.

    Args:
        topk_indices: [T, K] int32 or int64; negative or at least `num_experts` means unused.
        num_experts: E.
        block_m: Rows a tile.
        max_rows: At most so many rows; slots beyond them get row -2. None for as many as there are slots.
    """
    num_slots = topk_indices.numel()
    chunk = CHUNKS[num_slots > _MANY_SLOTS]
    num_chunks = max(1, -(-num_slots // chunk))
    order = SlotOrder.empty_like(topk_indices, num_slots, num_experts, max_rows)
    metadata = RoutingMetadata(*order.tensors(), torch.empty_like(order.expert_start))
    counts = None
    if num_chunks > 1:
        bins = count_constants(num_experts, chunk)["BINS"]
        counts = topk_indices.new_empty(num_chunks, bins, dtype=torch.int32)
        operands = (topk_indices, counts, num_slots)
        launch(count_slots_kernel, (num_chunks,), operands, count_constants, num_experts, chunk)
    starts, orders = (metadata.expert_start, metadata.tile_start), (metadata.row_slot, metadata.slot_row)
    launch(
        place_slots_kernel,
        (num_chunks,),
        (topk_indices, counts, *starts, *orders, num_slots, num_chunks, max_rows),
        place_constants,
        num_experts,
        chunk,
        block_m,
    )
    return metadata


def count_constants(num_experts: int, chunk: int) -> dict[str, Any]:
    """The first kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        "num_experts": num_experts,
        "BINS": max(2, triton.next_power_of_2(num_experts)),
        "CHUNK": chunk,
        "COUNT_BLOCK": COUNT_BLOCK,
        "num_warps": 8,
    }


def place_constants(num_experts: int, chunk: int, block_m: int) -> dict[str, Any]:
    """The second kernel's compile-time arguments, for launches and for compile-only checks."""
    constants = count_constants(num_experts, chunk)
    rows = max(1, min(16, 4096 // constants["BINS"]))
    return {**constants, "SLOT_BLOCK": SLOT_BLOCK, "ROWS": rows, "BLOCK_M": block_m, "max_rows": None}


def tiles_of(expert_start: Tensor, block_m: int) -> Tensor:
    """Return `tile_start` for tiles of `block_m` rows; the backward pass need not use the forward pass's tiles.

    Args:
        expert_start: [E + 1] int32.
        block_m: Rows a tile.
    """
    num_experts, tile_start = expert_start.numel() - 1, torch.empty_like(expert_start)
    launch(count_tiles_kernel, (1,), (expert_start, tile_start), tile_constants, num_experts, block_m)
    return tile_start


def tile_constants(num_experts: int, block_m: int) -> dict[str, Any]:
    """The compile-time arguments of `count_tiles_kernel`."""
    return {"num_experts": num_experts, "BINS": triton.next_power_of_2(num_experts), "BLOCK_M": block_m}


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


@triton.jit
def _count_slots(ids_ptr, chunk, num_slots, num_experts, BINS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk's number of slots per expert."""
    begin = chunk.to(tl.int64) * CHUNK
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for first in range(begin, min(begin + CHUNK, num_slots), BLOCK):
        ids = _load_ids(ids_ptr, first + tl.arange(0, BLOCK), num_slots, num_experts)
        counts += tl.histogram(ids, BINS, mask=ids < num_experts)
    return counts


@triton.jit(do_not_specialize=["num_slots"])
def count_slots_kernel(
    ids_ptr,
    counts_ptr,
    num_slots,
    num_experts: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
):
    """Write one chunk's number of slots per expert to ``counts[chunk, :]``."""
    chunk = tl.program_id(0)
    counts = _count_slots(ids_ptr, chunk, num_slots, num_experts, BINS, CHUNK, COUNT_BLOCK)
    tl.store(counts_ptr + chunk.to(tl.int64) * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _sum_chunks(counts_ptr, chunk, num_chunks, BINS: tl.constexpr, ROWS: tl.constexpr):
    """Slots per expert of all chunks, and of those before `chunk`."""
    totals = tl.zeros((ROWS, BINS), dtype=tl.int32)
    earlier = tl.zeros((ROWS, BINS), dtype=tl.int32)
    for first in range(0, num_chunks, ROWS):
        chunks = first + tl.arange(0, ROWS)
        pointers = counts_ptr + chunks.to(tl.int64)[:, None] * BINS + tl.arange(0, BINS)[None, :]
        counts = tl.load(pointers, mask=(chunks < num_chunks)[:, None], other=0)
        totals += counts
        earlier += tl.where((chunks < chunk)[:, None], counts, 0)
    return tl.sum(totals, 0), tl.sum(earlier, 0)


@triton.jit(do_not_specialize=["num_slots", "num_chunks", "max_rows"])
def place_slots_kernel(
    ids_ptr,
    counts_ptr,
    expert_start_ptr,
    tile_start_ptr,
    row_slot_ptr,
    slot_row_ptr,
    num_slots,
    num_chunks,
    max_rows,
    num_experts: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Give every slot of a chunk its row: expert's start + chunk's first + rank within the chunk."""
    chunk = tl.program_id(0)
    experts, places = tl.arange(0, BINS), tl.arange(0, SLOT_BLOCK)
    if counts_ptr is None:
        totals = _count_slots(ids_ptr, chunk, num_slots, num_experts, BINS, CHUNK, COUNT_BLOCK)
        earlier = tl.zeros((BINS,), dtype=tl.int32)
    else:
        totals, earlier = _sum_chunks(counts_ptr, chunk, num_chunks, BINS, ROWS)
    ends = tl.cumsum(totals, 0)
    if chunk == 0:
        is_expert = experts < num_experts
        kept, kept_ends = totals, ends
        if max_rows is not None:
            kept_ends = tl.minimum(ends, max_rows)
            kept = kept_ends - tl.minimum(ends - totals, max_rows)
        tl.store(expert_start_ptr, 0)
        tl.store(tile_start_ptr, 0)
        tl.store(expert_start_ptr + 1 + experts, kept_ends, mask=is_expert)
        tl.store(tile_start_ptr + 1 + experts, tl.cumsum((kept + BLOCK_M - 1) // BLOCK_M, 0), mask=is_expert)
    starts = ends - totals + earlier
    begin = chunk.to(tl.int64) * CHUNK
    for first in range(begin, min(begin + CHUNK, num_slots), SLOT_BLOCK):
        slots = first + places
        ids = _load_ids(ids_ptr, slots, num_slots, num_experts)
        # The same ids laid out along the other axis, read again: a transposition in registers costs more.
        others = _load_ids(ids_ptr, first + places, num_slots, num_experts)
        is_earlier = (ids[:, None] == others[None, :]) & (places[:, None] > places[None, :])
        is_used = ids < num_experts
        row = tl.gather(starts, tl.where(is_used, ids, 0), 0) + tl.sum(is_earlier.to(tl.int32), 1)
        is_row = is_used
        if max_rows is not None:
            is_row &= row < max_rows
            row = tl.where(is_row, row, -2)
        tl.store(row_slot_ptr + row, slots.to(tl.int32), mask=is_row)
        tl.store(slot_row_ptr + slots, tl.where(is_used, row, -1), mask=slots < num_slots)
        starts += tl.histogram(ids, BINS, mask=is_used)


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
