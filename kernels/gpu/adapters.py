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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_kernels.gpu.factor_gradients import NO_PRODUCT, Product, factor_gradients
from deepseek_kernels.gpu.low_rank import low_rank_rows, rows_tile
from deepseek_kernels.gpu.low_rank_step import LowRankStep
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata
from deepseek_kernels.gpu.tiles import Tiles
from deepseek_kernels.gpu.transpose_pair import transpose_pair

NOTHING = (NO_PRODUCT, NO_PRODUCT)


class Call(NamedTuple):
    """What the thin products of one call share.

    Attributes:
        metadata: The sorted order, with the tiles' height.
        num_slots: K.
        tiles: Of the wide products.
    """

    metadata: RoutingMetadata
    num_slots: int
    tiles: Tiles


@dataclass(eq=False, slots=True)
class Adapter:
    """The adapter of one projection, with what the backward pass needs of the forward pass.

    Attributes:
        a: [E * r, N], contiguous.
        b: [M, r * E], as PEFT keeps it: the expert runs fastest.
        by_expert: `b` as [E, M, r] in the dtype of the rows; `Adapters.fill_gradients` writes over it.
        scaling: Of the product.
        low: ``scaling * x A^T`` of every row, [S, r]; the forward pass fills it.
        needs_a: Whether the gradient of `a` is wanted.
        needs_b: Whether that of `b` is.
        through: ``scaling * dy B`` of every row, [S, r]; `backward` makes it.
        grad_a: Like `a`; `Adapters.fill_gradients` makes it where wanted.
        grad_b: Like `b`.
    """

    a: Tensor
    b: Tensor
    by_expert: Tensor
    scaling: float
    low: Tensor
    needs_a: bool = True
    needs_b: bool = True
    through: Tensor | None = None
    grad_a: Tensor | None = None
    grad_b: Tensor | None = None

    def forward(self, x: Tensor, call: Call, *, is_by_token: bool) -> LowRankStep:
        """Fill `low` and return the step of the forward product.

        Args:
            x: [S, N] by row, or [T, N] by token.
            call: With the sorted order.
            is_by_token: Whether `x` lies by token.
        """
        self._rows(x, self.a, self.low, call, transpose=True, is_by_token=is_by_token)
        return LowRankStep(self.low, self.by_expert)

    def backward(self, grad_out: Tensor, call: Call, *, is_by_token: bool) -> LowRankStep:
        """Fill `through` and return the step of the input's gradient.

        Args:
            grad_out: [S, M] by row, or [T, M] by token.
            call: With the sorted order.
            is_by_token: Whether `grad_out` lies by token.
        """
        through = self.through = torch.empty_like(self.low)
        self._rows(grad_out, self.by_expert, through, call, transpose=False, is_by_token=is_by_token)
        return LowRankStep(through, self.a)

    def products(self, grad_out: Tensor, x: Tensor | None) -> tuple[Product, Product]:
        """Return what sums to the gradients of `b`, by expert, and of `a`.

        Args:
            grad_out: As in `backward`.
            x: As in `forward`, multiplied by whatever `grad_out` was before `through` was made of it; None if the
                gradient of `a` is not wanted.
        """
        of_b = of_a = NO_PRODUCT
        if self.needs_b:
            # The rows have been multiplied by the factor: its memory takes the gradient where it fits.
            fits = self.by_expert.dtype == self.b.dtype
            by_expert = self.by_expert if fits else torch.empty_like(self.b)
            of_b = Product(grad_out, self.low, by_expert)
        if self.needs_a:
            self.grad_a = torch.empty_like(self.a)
            of_a = Product(x, self.through, self.grad_a)
        return of_b, of_a

    def _rows(
        self, values: Tensor, factor: Tensor, out: Tensor, call: Call, *, transpose: bool, is_by_token: bool
    ) -> None:
        metadata, num_slots, tiles = call
        low_rank_rows(
            values,
            factor,
            out,
            metadata,
            num_slots,
            rows_tile(tiles.down, out.shape[1]),
            scaling=self.scaling,
            transpose=transpose,
            is_by_token=is_by_token,
        )


class Adapters(NamedTuple):
    """The adapters of one experts module; either may be missing."""

    gate_up: Adapter | None = None
    down: Adapter | None = None

    @property
    def need_scaled_rows(self) -> bool:
        """Whether the gradient of the down projection's A is wanted."""
        return self.down is not None and self.down.needs_a

    def fill_gradients(
        self,
        grad_output: Tensor,
        scaled: Tensor | None,
        grad_h: Tensor,
        hidden_states: Tensor,
        topk_weights: Tensor,
        call: Call,
    ) -> None:
        """Compute `grad_a` and `grad_b` of both where wanted, by one kernel; zeros for experts without rows.

        Args:
            grad_output: [T, H].
            scaled: The activated rows times their router weights, [S, I]; None unless `need_scaled_rows`.
            grad_h: [S, 2I].
            hidden_states: [T, H].
            topk_weights: [T, K].
            call: With the sorted order.
        """
        gate_up, down = self
        b_down, a_down = NOTHING if down is None else down.products(grad_output, scaled)
        b_gate_up, a_gate_up = NOTHING if gate_up is None else gate_up.products(grad_h, hidden_states)
        products = (b_down, a_down, b_gate_up, a_gate_up)
        factor_gradients(products, topk_weights, call.metadata, call.tiles.weight_gradient)
        by_expert = (b_gate_up.gradient, b_down.gradient)
        targets = (_like_b(gate_up, by_expert[0]), _like_b(down, by_expert[1]))
        transpose_pair(by_expert, targets, call.metadata.expert_start.shape[0] - 1, is_by_expert=True)
        if gate_up is not None:
            gate_up.grad_b = targets[0]
        if down is not None:
            down.grad_b = targets[1]


def _like_b(adapter: Adapter | None, gradient: Tensor | None) -> Tensor | None:
    return None if adapter is None or gradient is None else torch.empty_like(adapter.b)


def make_adapters(
    factors: Sequence[Tensor],
    scalings: Sequence[float],
    rows: Sequence[Tensor],
    num_experts: int,
    needs: Sequence[bool] = (True,) * 4,
) -> Adapters:
    """Return the adapters of factors as PEFT stores them; both factors B are put in order by one kernel.

    Args:
        factors: A and B of the first projection, then of the second; without elements where there is none.
        scalings: Of both.
        rows: What `Adapter.low` will be; its dtype is that of the products.
        num_experts: E.
        needs: Whose gradients are wanted, in the order of the factors.
    """
    a, b, other_a, other_b = (one.contiguous() if one.numel() else None for one in factors)
    if a is None and other_a is None:
        return NO_ADAPTERS
    by_expert = None if b is None else torch.empty_like(b, dtype=rows[0].dtype)
    other_by_expert = None if other_b is None else torch.empty_like(other_b, dtype=rows[1].dtype)
    transpose_pair((b, other_b), (by_expert, other_by_expert), num_experts, is_by_expert=False)
    gate_up = down = None
    if a is not None and b is not None and by_expert is not None:
        gate_up = Adapter(a, b, by_expert, scalings[0], rows[0], needs[0], needs[1])
    if other_a is not None and other_b is not None and other_by_expert is not None:
        down = Adapter(other_a, other_b, other_by_expert, scalings[1], rows[1], needs[2], needs[3])
    return Adapters(gate_up, down)


NO_ADAPTERS = Adapters()
