"""Experts in 4 bits on a GPU: which tiles, and for how few rows the kernels multiply by the codes themselves.

``experts.py`` asks `packed_tiles` before each forward pass. Where it says None, and in every backward pass, the dense
kernels run on a copy of one projection at a time (``four_bit_dequantize``). The choice follows the rows per expert, as
that of the dense tiles does, so that gradients do not change the forward pass.

The sizes were chosen by compiling for sm_90 (registers, spills, instructions per weight), not by timing.
"""

from dataclasses import dataclass

from torch import Tensor

from deepseek_kernels.four_bit import PackedMatrices
from deepseek_kernels.gpu.decode import MAX_TOKENS
from deepseek_kernels.gpu.four_bit_codes import fits_products
from deepseek_kernels.gpu.tiles import Tile, row_bucket
from deepseek_kernels.gpu.triton_numerics import IS_INTERPRETED


@dataclass(frozen=True)
class PackedTiles:
    """The tiles of the two products; both of one `block_m`."""

    gate_up: Tile
    down: Tile

    def __post_init__(self) -> None:
        assert self.gate_up.block_m == self.down.block_m  # one map of tiles for both

    @property
    def block_m(self) -> int:
        """Rows a tile."""
        return self.gate_up.block_m


# Of few tokens every expert has a row or two: narrow blocks, so that there are programs for all multiprocessors.
DECODING = PackedTiles(Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4))
# By the bucket of rows per expert. Words of NF4 are looked up, which takes registers: 8 warps where int4 needs 4.
BY_ROWS = {
    "int4": (
        PackedTiles(Tile(16, 64, 128, 4, 3), Tile(16, 128, 128, 4, 3)),
        PackedTiles(Tile(64, 64, 128, 4, 3), Tile(64, 128, 128, 8, 3)),
    ),
    "nf4": (
        PackedTiles(Tile(16, 64, 128, 4, 3), Tile(16, 128, 128, 4, 3)),
        PackedTiles(Tile(64, 64, 128, 8, 3), Tile(64, 128, 128, 8, 3)),
    ),
}
INTERPRETED = PackedTiles(Tile(16, 16, 32, 1, 1), Tile(16, 16, 32, 1, 1))


def packed_tiles(
    hidden_states: Tensor,
    gate_up_proj: Tensor | PackedMatrices,
    down_proj: Tensor | PackedMatrices,
    topk_indices: Tensor,
) -> PackedTiles | None:
    """Return the tiles with which both products multiply by codes; None where they take dense matrices.

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H], a tensor or in 4 bits.
        down_proj: [E, H, I], likewise.
        topk_indices: [T, K].
    """
    if not isinstance(gate_up_proj, PackedMatrices) or not isinstance(down_proj, PackedMatrices):
        return None
    by_rows, dtype = BY_ROWS[gate_up_proj.format.name], hidden_states.dtype
    bucket = row_bucket(topk_indices.numel(), gate_up_proj.shape[0])
    if bucket >= len(by_rows) or not (fits_products(gate_up_proj, dtype) and fits_products(down_proj, dtype)):
        return None
    if IS_INTERPRETED:
        return INTERPRETED
    return DECODING if hidden_states.shape[0] <= MAX_TOKENS else by_rows[bucket]
