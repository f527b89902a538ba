"""How a product gets its weights: by pointers, or by a descriptor that the copy engine of sm_90 and later walks.

A descriptor moves a whole block per instruction, computes no addresses in the loop and needs no masks: what lies
outside an expert's matrix arrives as zeros. It needs rows of a multiple of 16 bytes. `Tile.uses_descriptor` asks for
it; weights that do not fit take pointers.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_kernels.gpu.tiles import Tile

_ALIGNMENT = 16


def weight_operand(weights: Tensor, tile: Tile, rows: int, columns: int) -> Tensor | TensorDescriptor:
    """Return the weights as the kernel takes them with this tile.

    Args:
        weights: [E, R, C], contiguous.
        tile: Sizes of the tiles.
        rows: Rows of one block.
        columns: Columns of one block.
    """
    row_bytes = weights.shape[2] * weights.element_size()
    if tile.uses_descriptor and row_bytes % _ALIGNMENT == 0 and weights.data_ptr() % _ALIGNMENT == 0:
        return TensorDescriptor.from_tensor(weights, [1, rows, columns])
    return weights


@triton.jit
def load_block(descriptor, expert, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One block of an expert's matrix."""
    return descriptor.load([expert.to(tl.int32), row, column]).reshape(ROWS, COLUMNS)


@triton.jit
def load_rows(pointers, is_inner, EVEN: tl.constexpr):
    """Rows of the other operand; those outside the tile may be any rows, for their results are not stored."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=is_inner[None, :], other=0.0)
