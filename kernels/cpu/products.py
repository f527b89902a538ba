"""Matrix products on a CPU into buffers that exist, by whichever of torch's libraries is faster at the size.

Both CPU paths of ``fused_moe`` multiply by these. Surprising: torch sends fp32 products to MKL and half precision to
oneDNN; for few rows oneDNN is the faster for fp32 too, even where its result has to be copied, because it has no
``out``. Times: one core of AMD EPYC 9004, 2026-11.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# A private operator of torch, the one Inductor emits on x86; without it fp32 falls back to torch.mm's own choice.
_HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_FEW_ROWS = 8


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type sums are kept in: float64 for float64, else float32.

    Args:
        dtype: Of the operands.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


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
