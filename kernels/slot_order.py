"""The order in which the slots are computed: what the forward pass sorts and the backward pass needs again.

A slot is one (token, choice) pair, number ``t * K + k``; a row is a slot's place once the used slots are sorted by
expert. `fused_moe` keeps a `SlotOrder` between its two passes. The CPU's ``cpu.experts.route`` and the GPU's
``gpu.routing_metadata`` both make one, and its three tensors mean the same on both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SlotOrder:
    """Slots sorted by expert.

    Attributes:
        row_slot: Slot of each row; beyond the used rows undefined. [R] int32, R = S where nobody bounds the rows.
        slot_row: Row of each slot, -1 if the slot is unused, -2 if there were more used ones than rows. [S] int32.
        expert_start: First row of each expert, then the number of used rows. [E + 1] int32.
    """

    row_slot: Tensor
    slot_row: Tensor
    expert_start: Tensor

    @staticmethod
    def empty_like(indices: Tensor, num_slots: int, num_experts: int, max_rows: int | None = None) -> SlotOrder:
        """Return an order whose values are still to be written.

        Args:
            indices: Any tensor on the right device.
            num_slots: S.
            num_experts: E.
            max_rows: Rows there are; None for S.
        """
        lengths = (num_slots if max_rows is None else max_rows, num_slots, num_experts + 1)
        return SlotOrder(*(indices.new_empty(length, dtype=torch.int32) for length in lengths))

    @staticmethod
    def none_like(indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three empty tensors: what an operator gives back where no order is kept.

        Args:
            indices: Any tensor on the right device.
        """
        row_slot, slot_row, expert_start = (indices.new_empty(0, dtype=torch.int32) for _ in range(3))
        return row_slot, slot_row, expert_start

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three tensors in the order of the constructor, for operators, which know no dataclasses."""
        return self.row_slot, self.slot_row, self.expert_start

    def counts(self) -> list[int]:
        """Return the rows of each expert; waits for the device."""
        return self.expert_start.diff().tolist()
