"""The MoE layer expert by expert in a chosen precision, and how far a result is from it tile by tile.

What tests, the benchmark and ``tune`` hold results against: `expert_loop` computes output and gradients in float32 or
float64 from the operands as they are, in memory for one expert at a time; `largest_tile_error` compares.
One norm over a whole tensor does not see a wrong tile. Four tiles of zeros among 6144 change it by 2.6 %, which bf16
may.

T tokens, K slots per token, H hidden, I expert width, E experts.
"""

import math

import torch
from torch import Tensor

from deepseek_kernels.activations import apply_activation, canonical_activation

BLOCK = 128
# Of a block's norm, against float32 or float64. bf16 rounds h, a, y and the result, each by 1.6e-3 of its size, and
# the gradients pass through two more; a wrong tile is off by 1. fp32 sums some thousands of products.
TILE_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_FEW_ELEMENTS = 64
_SMALLEST_SHARE = 1 / 8


def expert_loop(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "silu",
    grad_output: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return the output and, given its gradient, those of the four float operands, all in `dtype`.

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        topk_indices: [T, K]; negative or at least E means unused.
        topk_weights: [T, K].
        activation: As in `fused_moe`.
        grad_output: [T, H].
        dtype: To compute in.
    """
    activation = canonical_activation(activation)
    slots, num_slots = topk_indices.reshape(-1), topk_indices.shape[1]
    needs_grad = grad_output is not None
    results = [torch.zeros_like(hidden_states, dtype=dtype)]
    if grad_output is not None:
        operands = (hidden_states, gate_up_proj, down_proj, topk_weights)
        results += [torch.zeros_like(operand, dtype=dtype) for operand in operands]
    for expert in range(gate_up_proj.shape[0]):
        rows = (slots == expert).nonzero().view(-1)
        if rows.numel() == 0:
            continue
        tokens = rows // num_slots
        operands = (hidden_states[tokens], gate_up_proj[expert], down_proj[expert], topk_weights.reshape(-1)[rows])
        x, gate_up, down, weight = (t.detach().to(dtype).requires_grad_(needs_grad) for t in operands)
        with torch.set_grad_enabled(needs_grad), torch.autocast(x.device.type, enabled=False):
            gate, up = (x @ gate_up.T).chunk(2, dim=-1)
            y = (apply_activation(gate, activation) * up) @ down.T * weight.unsqueeze(1)
        results[0].index_add_(0, tokens, y.detach())
        if grad_output is not None:
            grad = grad_output[tokens].to(dtype)
            grad_x, grad_gate_up, grad_down, grad_weight = torch.autograd.grad(y, (x, gate_up, down, weight), grad)
            results[1].index_add_(0, tokens, grad_x)
            results[2][expert], results[3][expert] = grad_gate_up, grad_down
            results[4].view(-1)[rows] = grad_weight
    return results


def largest_tile_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest error of a 128 x 128 block of the last two dimensions, relative to the block's norm.

    A block much smaller than its matrix elsewhere, or of a handful of elements, is held against the matrix's mean
    size, where the sum of its products may be near zero. Where zeros are expected anything else is infinite, and
    so is NaN everywhere.

    Args:
        got: Any shape; a vector counts as a column.
        expected: The same shape, on the same device.
    """
    if got.shape != expected.shape:
        raise ValueError(f"got: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if expected.numel() == 0:
        return 0.0
    wide = torch.float64 if torch.float64 in (got.dtype, expected.dtype) else torch.float32
    columns = expected.shape[-1] if expected.dim() > 1 else 1
    rows = expected.shape[-2] if expected.dim() > 1 else expected.numel()
    matrices = zip(got.reshape(-1, rows, columns), expected.reshape(-1, rows, columns), strict=True)
    return float(torch.stack([_matrix_error(one.to(wide), other.to(wide)) for one, other in matrices]).max())


def _matrix_error(got: Tensor, expected: Tensor) -> Tensor:
    """The largest error of a block of one matrix."""
    errors, sizes = _block_sums((got - expected).square()), _block_sums(expected.square())
    counts = _block_sums(torch.ones_like(expected))
    typical = counts * sizes.sum() / expected.numel()
    smallest = torch.where(counts < _FEW_ELEMENTS, typical, typical * _SMALLEST_SHARE**2)
    ratios = torch.where(errors == 0, errors, errors / torch.maximum(sizes, smallest))
    return torch.nan_to_num(ratios, nan=math.inf, posinf=math.inf).max().sqrt()


def _block_sums(values: Tensor) -> Tensor:
    """Sums over blocks; those at the edges are smaller."""
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.view(-(-rows // BLOCK), BLOCK, -(-columns // BLOCK), BLOCK).sum((1, 3))
