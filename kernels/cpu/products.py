"""Matrix products on a CPU into buffers that exist, by whichever of torch's libraries is faster at the size.

Both CPU paths of ``fused_moe`` multiply by these. Surprising: torch sends fp32 products to MKL and half precision to
oneDNN; for few rows oneDNN is the faster for fp32 too, even where its result has to be copied, because it has no
``out``. Times: one core of AMD EPYC 9004, 2026-11.

Where experts have a handful of rows, starting their products from Python costs more than a twentieth of the time:
torch's own loop over groups starts them at once. It has no place to write to, so that with many rows it is the slower.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# A private operator of torch, the one Inductor emits on x86; without it fp32 falls back to torch.mm's own choice.
_HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_FEW_ROWS = 8
_FEW_ROWS_PER_EXPERT = 16  # In the mean.
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type sums are kept in: float64 for float64, else float32.

    Args:
        dtype: Of the operands.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def takes_groups(num_rows: int, num_experts: int, widths: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether ``torch.nn.functional.grouped_mm`` should multiply all experts' rows at once.

    Torch takes rows of a multiple of 16 bytes only.

    Args:
        num_rows: Of all experts.
        num_experts: E.
        widths: Of all operands and results.
        dtype: Of the operands.
    """
    is_aligned = all(width * dtype.itemsize % 16 == 0 for width in widths)
    return is_aligned and dtype in _GROUPED_DTYPES and num_rows <= _FEW_ROWS_PER_EXPERT * num_experts


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T``; fp32 by oneDNN: 0.39 ms for 2 x 1024 x 1024, MKL 0.52, and 5 % ahead at 192 rows.

    Args:
        x: [R, K].
        weight: [N, K].
    """
    if x.dtype == torch.float32 and _HAS_ONEDNN_LINEAR:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def linear_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write ``x @ weight.T`` into `out`.

    Args:
        x: [R, K].
        weight: [N, K].
        out: [R, N].
    """
    if x.shape[0] <= _FEW_ROWS and x.dtype == torch.float32:
        out.copy_(linear(x, weight))
    else:
        torch.mm(x, weight.t(), out=out)


def matmul_into(x: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Write ``x @ matrix`` into `out`.

    Args:
        x: [R, K].
        matrix: [K, N].
        out: [R, N].
    """
    torch.mm(x, matrix, out=out)


def outer_into(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write ``left.T @ right`` into `out`; 0.19 ms for two rows of 1024 by oneDNN and a copy, 0.72 ms by MKL.

    Args:
        left: [R, M].
        right: [R, N].
        out: [M, N].
    """
    if left.shape[0] <= _FEW_ROWS and left.dtype == torch.float32 and _HAS_ONEDNN_LINEAR:
        out.copy_(linear(left.t().contiguous(), right.t().contiguous()))
    else:
        torch.mm(left.t(), right, out=out)
