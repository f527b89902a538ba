"""What ``deepseek-moe bench kernels`` measures: shapes, kinds of routing, and the fixed grids of them.

``benchmarks/kernels.py`` runs the cells. Unused slots carry the expert that was chosen before, so that those
who cannot skip a slot do what transformers' own models make them do, and `mask_unused` marks them for the others.

T tokens, K slots per token, H hidden, I expert width, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DECODE_TOKENS = 64


@dataclass(frozen=True)
class Cell:
    """One shape and kind of routing: ``balanced``, ``skewed`` or ``dynamic`` (two thirds to all slots used)."""

    T: int
    H: int
    I: int  # noqa: E741
    E: int
    K: int
    routing: str = "balanced"
    dtype: str = "float32"

    @property
    def is_decode(self) -> bool:
        """Whether so few tokens run that reading the weights is the work."""
        return self.T <= DECODE_TOKENS

    @property
    def title(self) -> str:
        """The shape in words."""
        return f"T={self.T} H={self.H} I={self.I} E={self.E} K={self.K} {self.routing} {self.dtype}"


@dataclass(frozen=True)
class Routing:
    """Which experts each token is sent to.

    Attributes:
        indices: Chosen experts [T, K], unused slots included.
        weights: Router weights [T, K], 0 at unused slots.
        is_unused: [T, K].
    """

    indices: Tensor
    weights: Tensor
    is_unused: Tensor

    def mask_unused(self, num_experts: int) -> Tensor:
        """Return the indices with `num_experts` at unused slots."""
        return self.indices.masked_fill(self.is_unused, num_experts)

    @property
    def num_used(self) -> int:
        """Used slots."""
        return int((~self.is_unused).sum())

    @property
    def num_experts_used(self) -> int:
        """Experts that get at least one row."""
        return len(self.indices[~self.is_unused].unique())


def make_routing(cell: Cell, device: str) -> Routing:
    """Return the routing of a cell, from a fixed seed.

    Args:
        cell: The shape.
        device: Where to put it.
    """
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(cell.T, cell.E, generator=generator)
    if cell.routing == "skewed":  # Zipf: the first expert is chosen E times as often as the last
        scores = scores ** torch.arange(1, cell.E + 1)
    indices = scores.topk(cell.K).indices
    weights = torch.rand(cell.T, cell.K, generator=generator)
    is_unused = torch.zeros_like(indices, dtype=torch.bool)
    if cell.routing == "dynamic":
        used = torch.randint(-(-2 * cell.K // 3), cell.K + 1, (cell.T, 1), generator=generator)
        is_unused = torch.arange(cell.K) >= used
    return Routing(indices.to(device), weights.masked_fill(is_unused, 0).to(device), is_unused.to(device))


_BOTH = ("float32", "bfloat16")
_CPU_SHAPES = [(2048, 512, 256, 128, 12), (2048, 512, 256, 16, 4), (4096, 256, 128, 32, 4), (1024, 1024, 512, 64, 8)]
_CPU_SHAPES += [(T, 1024, 512, 64, 8) for T in (1, 4, 16, 64)]
_CPU_SHAPES += [(4096, 128, 96, 16, 4)]
CPU_GRID = [Cell(*shape, dtype=dtype) for shape in _CPU_SHAPES for dtype in _BOTH]
CPU_GRID += [Cell(4096, 256, 128, 32, 4, routing, dtype) for routing in ("skewed", "dynamic") for dtype in _BOTH]
_LARGE = [(32768, 2048, 768, 128, 12), (8192, 2048, 768, 128, 12), (32768, 4096, 1536, 128, 8)]
# The last in 80 GiB: DeepSeek-V3's expert, a quarter of its experts.
_LARGE += [
    (4096, 2048, 768, 128, 12),
    (1024, 2048, 768, 128, 12),
    (32768, 2048, 768, 128, 8),
    (8192, 7168, 2048, 64, 8),
]
GPU_GRID = [Cell(*shape, dtype="bfloat16") for shape in _LARGE]
GPU_GRID += [Cell(*_LARGE[1], routing, "bfloat16") for routing in ("skewed", "dynamic")]
GPU_GRID += [Cell(T, 2048, 768, 128, 12, dtype="bfloat16") for T in (1, 4, 16, 64)]
# What a lease of minutes has room for, the most telling first.
LEASE_GRID = [GPU_GRID[i] for i in (0, 3, 4, 5, 6, 9, 11)]
QUICK_GRID = [Cell(64, 64, 48, 8, 2), Cell(64, 64, 48, 8, 3, "dynamic"), Cell(1, 64, 48, 8, 2, dtype="bfloat16")]
GRIDS = {"cpu": CPU_GRID, "gpu": GPU_GRID, "lease": LEASE_GRID, "quick": QUICK_GRID}
