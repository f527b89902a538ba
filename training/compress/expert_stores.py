"""Where `awq` puts rounded experts: packed in 4 bits, or as rounded values in their own weights for other bits."""

import dataclasses
from typing import Any, Protocol

from torch import Tensor, nn

from modeling_deepseek.four_bit_experts import begin_four_bits, end_four_bits, find_format


@dataclasses.dataclass(frozen=True)
class Rounding:
    """A matrix about to be stored.

    Attributes:
        values: `[M, N]` in fp32, codes times scales.
        scales: `[M, G]`; None: nothing was rounded.
    """

    values: Tensor
    scales: Tensor | None = None

    def with_upper_rows_divided(self, scale: Tensor) -> "Rounding":
        """Return it with the second half of its rows divided; rounding commutes with that.

        Args:
            scale: `[M / 2]`.
        """
        divisor = scale.new_ones(len(self.values), 1)
        divisor[len(divisor) // 2 :, 0] = scale
        return Rounding(self.values / divisor, None if self.scales is None else self.scales / divisor)


class Store(Protocol):
    """Where rounded experts go."""

    def put(self, name: str, expert: int, rounding: Rounding) -> None:
        """Keep one matrix.

        Args:
            name: Of the projection.
            expert: Its place.
            rounding: Its values.
        """

    def close(self) -> None:
        """Have the module compute by what was kept."""


class PackedStore:
    """Codes and scales in the module's `four_bit`.

    Args:
        experts: A fused module.
        settings: An `AwqSettings`.
    """

    def __init__(self, experts: nn.Module, settings: Any) -> None:
        self.experts = experts
        self.weights = begin_four_bits(experts, find_format(4, "int4", settings.group_size))

    def put(self, name: str, expert: int, rounding: Rounding) -> None:
        """Keep one matrix: see `Store`."""
        self.weights.fill_expert(name, expert, rounding.values.to(self.weights.dtype), rounding.scales)

    def close(self) -> None:
        """Have the module compute by its codes."""
        end_four_bits(self.experts)


class DenseStore:
    """The rounded values in the module's own weights, for bits that nothing packs.

    Args:
        experts: A fused module.
        settings: An `AwqSettings`.
    """

    def __init__(self, experts: nn.Module, settings: Any) -> None:
        self.experts = experts

    def put(self, name: str, expert: int, rounding: Rounding) -> None:
        """Keep one matrix: see `Store`."""
        self.experts.get_parameter(name).data[expert].copy_(rounding.values)

    def close(self) -> None:
        """Nothing: the module computes as before."""
