"""Which tile sizes the FP8 products run with.

A step is one group of 128 inner elements, so that its scales can be applied to what the step gives, and the result's
columns divide a block of 128, so that a tile meets one scale of the weights at a time. The products of a step need
registers of their own beside the sums: tiles are half of bf16's. They were chosen by compiling alone, for registers,
spills and shared memory (the tests repeat it), and those of many rows then by timing.
"""

import functools
from dataclasses import dataclass, replace

import torch

from deepseek_kernels.fp8 import GROUP
from deepseek_kernels.gpu.tiles import Tile, Tiles, choose_tiles, device_family, row_bucket


@dataclass(frozen=True)
class Fp8Tiles:
    """The tiles of one call's FP8 products, all of one `block_m`, as they share the tile map."""

    gate_up: Tile
    down: Tile
    down_backward: Tile
    input_gradient: Tile

    @property
    def block_m(self) -> int:
        """Rows a tile."""
        return self.gate_up.block_m


# Fits 99 KiB of shared memory: Ada, and Blackwell's cards for workstations.
SAFE = Fp8Tiles(
    gate_up=Tile(64, 32, GROUP, 4, 3),
    down=Tile(64, 64, GROUP, 4, 3),
    down_backward=Tile(64, 64, GROUP, 4, 2),
    input_gradient=Tile(64, 64, GROUP, 4, 3),
)
FEW_ROWS = Fp8Tiles(
    gate_up=Tile(16, 64, GROUP, 4, 3),
    down=Tile(16, 64, GROUP, 4, 4),
    down_backward=Tile(16, 64, GROUP, 4, 3),
    input_gradient=Tile(16, 64, GROUP, 4, 4),
)
SOME_ROWS = Fp8Tiles(
    gate_up=Tile(64, GROUP, GROUP, 8, 3, uses_descriptor=True),
    down=Tile(64, 128, GROUP, 4, 4, uses_descriptor=True),
    down_backward=Tile(64, 64, GROUP, 4, 4, uses_descriptor=True),
    input_gradient=Tile(64, 128, GROUP, 4, 4, uses_descriptor=True),
)
# On an H200 (2026-11-26, T 32768, H 2048, I 768) beside the tiles of 128 rows before: down 1.05 ms against 1.46,
# input_gradient 1.93 against 2.25, down_backward 1.73 against 1.94, gate_up 2.59 against 2.57. In another run groups
# of 32 row tiles beside groups of 8: down 1.03 against 1.10, input_gradient 1.85 against 1.93.
MANY_ROWS = Fp8Tiles(
    gate_up=Tile(64, 64, GROUP, 4, 3, uses_descriptor=True),
    down=Tile(64, 128, GROUP, 4, 3, group_m=32, uses_descriptor=True),
    down_backward=Tile(64, 128, GROUP, 8, 3, uses_descriptor=True),
    input_gradient=Tile(64, 128, GROUP, 4, 3, group_m=32, uses_descriptor=True),
)
# Where 64 rows of gate and up spill.
MANY_ROWS_SM_100 = Fp8Tiles(
    gate_up=Tile(128, 64, GROUP, 8, 3, uses_descriptor=True),
    down=Tile(128, 128, GROUP, 8, 4, uses_descriptor=True),
    down_backward=Tile(128, 128, GROUP, 8, 3, uses_descriptor=True),
    input_gradient=Tile(128, 128, GROUP, 8, 4, uses_descriptor=True),
)
# By family and bucket of rows per expert, as in ``tiles``.
SHIPPED = {
    "sm_90": (FEW_ROWS, SOME_ROWS, MANY_ROWS),
    "sm_100": (FEW_ROWS, SOME_ROWS, MANY_ROWS_SM_100),
    "sm_80": (FEW_ROWS, SAFE, SAFE),
}
# In the interpreter: small, and every loop over groups, tiles and columns still has several steps.
INTERPRETED = Fp8Tiles(
    gate_up=Tile(16, 64, GROUP, 1, 1, uses_descriptor=True),
    down=Tile(16, 64, GROUP, 1, 1, uses_descriptor=True),
    down_backward=Tile(16, 64, GROUP, 1, 1, group_m=2),
    input_gradient=Tile(16, 128, GROUP, 1, 1),
)


def choose_fp8_tiles(device: torch.device, num_rows: int, num_experts: int) -> Fp8Tiles:
    """Return the tiles of a call.

    Args:
        device: Where the tensors are; a CPU means the interpreter.
        num_rows: S.
        num_experts: E.
    """
    if device.type == "cpu":
        return INTERPRETED
    return SHIPPED[device_family(device) or "sm_80"][row_bucket(num_rows, num_experts)]


def weight_gradient_tile(hidden_states: torch.Tensor, width: int, num_rows: int, num_experts: int) -> Tile:
    """Return the tile of the weight gradients, which are not in FP8: the one that `fused_moe` takes.

    Args:
        hidden_states: [T, H].
        width: I.
        num_rows: S.
        num_experts: E.
    """
    if hidden_states.device.type == "cpu":
        return Tile(128, 128, 32, 1, 1)
    bucket = row_bucket(num_rows, num_experts)
    tiles = choose_tiles(hidden_states.device, hidden_states.shape[1], width, bucket, hidden_states.dtype)
    return tiles.weight_gradient


def adapter_tiles(hidden_states: torch.Tensor, down_proj: torch.Tensor, num_rows: int) -> Tiles:
    """Return tiles for an adapter's thin products, which are not in FP8: `fused_moe`'s, as high as those of FP8.

    Args:
        hidden_states: [T, H].
        down_proj: [E, H, I].
        num_rows: S.
    """
    num_experts, hidden, width = down_proj.shape
    bucket = row_bucket(num_rows, num_experts)
    tiles = choose_tiles(hidden_states.device, hidden, width, bucket, hidden_states.dtype)
    height = choose_fp8_tiles(hidden_states.device, num_rows, num_experts).block_m
    return _as_high(tiles, height)


@functools.lru_cache(maxsize=64)
def _as_high(tiles: Tiles, height: int) -> Tiles:
    return replace(tiles, down=replace(tiles.down, block_m=height))
