"""Low-rank adapters of the experts on a GPU: which thin products run around the wide ones, and on what.

``W_e + scaling * B_e A_e`` is never formed, nor its gradient. The r numbers of every row carry the scaling, so that
both the wide product that takes them in and the gradient of B multiply once. Per row with input x, output y and
router weight w:

    low = scaling * x A^T                 y = x W^T + low B^T
    through = scaling * dy B              dx = dy W + through A
    dB = dy^T low                         dA = through^T x

The down projection's dy is w times the output's gradient. Its kernel multiplies by w after the product, hence
`through` leaves w out; in dB it multiplies low, and in dA it is in the activated rows, which come scaled.

T tokens, K slots per token, S rows, r rank, N inputs and M outputs of the adapted matrix, E experts.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_kernels.gpu.low_rank import factor_gradient, gradient_tile, low_rank_rows, rows_tile
from deepseek_kernels.gpu.low_rank_step import LowRankStep
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata
from deepseek_kernels.gpu.tiles import Tiles


@dataclass(frozen=True)
class Call:
    """What the thin products of one call share.

    Attributes:
        metadata: The sorted order, with the tiles' height.
        num_slots: K.
        tiles: Of the wide products.
    """

    metadata: RoutingMetadata
    num_slots: int
    tiles: Tiles


@dataclass
class Adapter:
    """The adapter of one projection, with what the backward pass needs of the forward pass.

    Attributes:
        a: [E * r, N].
        b: [M, r * E], as PEFT keeps it: the expert runs fastest.
        scaling: Of the product.
        low: ``scaling * x A^T`` of every row, [S, r]; the forward pass fills it.
        num_experts: E.
        grad_a: Like `a`; `fill_gradients` makes it.
        grad_b: Like `b`.
    """

    a: Tensor
    b: Tensor
    scaling: float
    low: Tensor
    num_experts: int
    grad_a: Tensor = field(init=False)
    grad_b: Tensor = field(init=False)

    def forward(self, x: Tensor, call: Call, *, is_by_token: bool) -> LowRankStep:
        """Fill `low` and return the step of the forward product.

        Args:
            x: [S, N] by row, or [T, N] by token.
            call: With the sorted order.
            is_by_token: Whether `x` lies by token.
        """
        self._rows(x, self._a_by_expert(x.dtype), call, transpose=True, is_by_token=is_by_token, out=self.low)
        return LowRankStep(self.low, self._b_by_expert(x.dtype))

    def backward(self, grad_out: Tensor, call: Call, *, is_by_token: bool) -> LowRankStep:
        """Return the step of the input's gradient.

        Args:
            grad_out: [S, M] by row, or [T, M] by token.
            call: With the sorted order.
            is_by_token: Whether `grad_out` lies by token.
        """
        factor = self._b_by_expert(grad_out.dtype)
        through = self._rows(grad_out, factor, call, transpose=False, is_by_token=is_by_token)
        return LowRankStep(through, self._a_by_expert(grad_out.dtype))

    def fill_gradients(
        self,
        step: LowRankStep,
        grad_out: Tensor,
        x: Tensor,
        call: Call,
        *,
        gather: str,
        row_weights: Tensor | None = None,
    ) -> None:
        """Compute `grad_a` and `grad_b`; zeros for experts without rows.

        Args:
            step: From `backward`.
            grad_out: As there.
            x: As in `forward`.
            call: With the sorted order.
            gather: ``grad_out`` or ``x``: which of the two lies by token.
            row_weights: [T, K], where `grad_out` lacks the router weights.
        """
        sorted_order = (call.metadata, call.num_slots, gradient_tile(call.tiles, step.rank))
        is_by_token = gather == "grad_out"
        self.grad_b = factor_gradient(
            grad_out,
            self.low,
            *sorted_order,
            factor=self.b,
            is_b=True,
            is_by_token=is_by_token,
            row_weights=row_weights,
        )
        self.grad_a = factor_gradient(
            x, step.rows, *sorted_order, factor=self.a, is_b=False, is_by_token=not is_by_token
        )

    def _rows(
        self,
        values: Tensor,
        factor: Tensor,
        call: Call,
        *,
        transpose: bool,
        is_by_token: bool,
        out: Tensor | None = None,
    ) -> Tensor:
        return low_rank_rows(
            values,
            factor,
            call.metadata,
            call.num_slots,
            rows_tile(call.tiles, self.low.shape[1]),
            scaling=self.scaling,
            transpose=transpose,
            is_by_token=is_by_token,
            out=out,
        )

    def _a_by_expert(self, dtype: torch.dtype) -> Tensor:
        """[E, r, N]."""
        return self.a.to(dtype).contiguous().view(self.num_experts, -1, self.a.shape[1])

    def _b_by_expert(self, dtype: torch.dtype) -> Tensor:
        """[E, M, r]: read as PEFT keeps it, every element of an expert would cost a sector of its own."""
        height, num_experts = self.b.shape[0], self.num_experts
        by_expert = torch.empty(num_experts, height, self.low.shape[1], dtype=dtype, device=self.b.device)
        return by_expert.copy_(self.b.reshape(height, -1, num_experts).permute(2, 0, 1))


class Adapters(NamedTuple):
    """The adapters of one experts module; either may be missing."""

    gate_up: Adapter | None = None
    down: Adapter | None = None


NO_ADAPTERS = Adapters()
