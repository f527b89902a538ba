"""Low-rank adapters of the experts on a CPU: what they add to an expert's rows, and the gradients of their factors.

``W_e + scaling * B_e A_e`` is never formed, nor its gradient: an expert's rows go through A and B as they lie, two
thin products beside the one with W. The paths of ``fused_moe`` call this between their own products.

Where experts have a handful of rows, starting a thin product from Python costs more than computing it, and a layer of
128 experts has 1536 of them in a training step: torch's own loop over groups takes half the time. It has no place to
write to, so that with many rows it is the slower one.

S rows, E experts, r rank, N inputs and M outputs of the adapted matrix.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_kernels.cpu import large_buffers
from deepseek_kernels.cpu.products import takes_groups


@dataclass
class LowRank:
    """The adapter of one projection, with what the backward pass needs of the forward pass.

    Attributes:
        a: [E, r, N].
        b: [E, M, r].
        scaling: Of the product.
        low: ``x A^T`` of every row, [S, r]; the forward pass fills it.
        expert_start: As in `SlotOrder`.
        grad_a: Like `a`; `make_gradients` makes it and the backward pass fills it.
        grad_b: Like `b`.
    """

    a: Tensor
    b: Tensor
    scaling: float
    low: Tensor
    expert_start: Tensor
    grad_a: Tensor = field(init=False)
    grad_b: Tensor = field(init=False)

    def make_gradients(self) -> None:
        """Make buffers for the factors' gradients, zero for experts without rows."""
        self.grad_a, self.grad_b = (large_buffers.empty(*one.shape, dtype=one.dtype) for one in (self.a, self.b))
        empty_experts = (self.expert_start.diff() == 0).nonzero().view(-1)
        for gradient in (self.grad_a, self.grad_b):
            gradient.index_fill_(0, empty_experts, 0)

    def add(self, counts: Sequence[int], x: Tensor, out: Tensor) -> None:
        """Add ``scaling * (x A^T) B^T`` to `out`.

        Args:
            counts: Rows per expert.
            x: [R, N], rows sorted by expert.
            out: [R, M].
        """
        low = self.low[: x.shape[0]]
        factors = (self.a.transpose(1, 2), self.b.transpose(1, 2))
        if self._takes_groups(x):
            ends = self.expert_start[1:]
            low.copy_(F.grouped_mm(x, factors[0], offs=ends))
            out.add_(F.grouped_mm(low, factors[1], offs=ends), alpha=self.scaling)
            return
        pieces = (one.split(counts) for one in (x, low, out))
        for x_e, low_e, out_e, a_e, b_e in zip(*pieces, *(one.unbind() for one in factors), strict=True):
            if x_e.shape[0]:
                _add(x_e, a_e, b_e, low_e, out_e, self.scaling)

    def add_one(self, expert: int, rows: slice, x: Tensor, out: Tensor) -> None:
        """Do the same for one expert.

        Args:
            expert: Its number.
            rows: Its place among all rows.
            x: [R, N].
            out: [R, M].
        """
        _add(x, self.a[expert].t(), self.b[expert].t(), self.low[rows], out, self.scaling)

    def backward(self, counts: Sequence[int], grad_out: Tensor, x: Tensor, grad_x: Tensor | None) -> None:
        """Fill the factors' gradients and add to `grad_x` what flows back through them.

        Args:
            counts: Rows per expert.
            grad_out: Gradient of `out`, [R, M].
            x: As in `add`.
            grad_x: [R, N]; None where it is not wanted.
        """
        low = self.low[: x.shape[0]]
        if self._takes_groups(x):
            ends = self.expert_start[1:]
            through = F.grouped_mm(grad_out, self.b, offs=ends).mul_(self.scaling)
            self.grad_a = F.grouped_mm(through.t(), x, offs=ends)
            self.grad_b = F.grouped_mm(grad_out.t(), low * self.scaling, offs=ends)
            if grad_x is not None:
                grad_x.add_(F.grouped_mm(through, self.a, offs=ends))
            return
        self.make_gradients()
        grad_pieces = [None] * len(counts) if grad_x is None else grad_x.split(counts)
        pieces = zip(*(one.split(counts) for one in (grad_out, x, low)), grad_pieces, strict=True)
        for expert, (grad_e, x_e, low_e, grad_x_e) in enumerate(pieces):
            if x_e.shape[0]:
                self._backward(expert, grad_e, x_e, low_e, grad_x_e)

    def backward_one(self, expert: int, rows: slice, grad_out: Tensor, x: Tensor, grad_x: Tensor | None) -> None:
        """Do the same for one expert.

        Args:
            expert: Its number.
            rows: Its place among all rows.
            grad_out: [R, M].
            x: [R, N].
            grad_x: [R, N] or None.
        """
        self._backward(expert, grad_out, x, self.low[rows], grad_x)

    def _takes_groups(self, x: Tensor) -> bool:
        widths = (self.a.shape[1], self.a.shape[2], self.b.shape[1])
        return takes_groups(x.shape[0], self.a.shape[0], widths, x.dtype)

    def _backward(self, expert: int, grad_out: Tensor, x: Tensor, low: Tensor, grad_x: Tensor | None) -> None:
        grad_b = self.grad_b[expert]
        through = torch.mm(grad_out, self.b[expert]).mul_(self.scaling)
        torch.mm(through.t(), x, out=self.grad_a[expert])
        torch.addmm(grad_b, grad_out.t(), low, beta=0, alpha=self.scaling, out=grad_b)
        if grad_x is not None:
            grad_x.addmm_(through, self.a[expert])


def stacked(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return factors as PEFT stores them as [E, r, N] and [E, M, r], the latter a view whose experts lie together.

    Args:
        a: [E * r, N].
        b: [M, r * E].
        num_experts: E.
    """
    rank = a.shape[0] // num_experts
    return a.reshape(num_experts, rank, -1), b.reshape(-1, rank, num_experts).permute(2, 0, 1)


def in_pefts_order(grad_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient [E, M, r] as [M, r * E].

    Args:
        grad_b: Contiguous.
        dtype: Of the result.
    """
    num_experts, height, rank = grad_b.shape
    flat = large_buffers.empty(height * rank, num_experts, dtype=dtype)
    return flat.copy_(grad_b.view(num_experts, -1).t()).view(height, rank * num_experts)


class Adapters(NamedTuple):
    """The adapters of one experts module; either may be missing."""

    gate_up: LowRank | None = None
    down: LowRank | None = None

    def for_many_rows(self) -> "Adapters":
        """Return them with B copied expert by expert: all of it is read, where few rows read only a little."""
        return Adapters(*(one and dataclasses.replace(one, b=_by_expert(one.b)) for one in self))


NO_ADAPTERS = Adapters()


def _by_expert(b: Tensor) -> Tensor:
    """The same in the order [E, M, r]; PEFT keeps [M, r, E], one transposition of a matrix away."""
    num_experts, height, rank = b.shape
    flat = large_buffers.empty(num_experts, height * rank, dtype=b.dtype)
    return flat.copy_(b.permute(1, 2, 0).reshape(height * rank, num_experts).t()).view(b.shape)


def _add(x: Tensor, a: Tensor, b: Tensor, low: Tensor, out: Tensor, scaling: float) -> None:
    torch.mm(x, a, out=low)
    out.addmm_(low, b, alpha=scaling)
