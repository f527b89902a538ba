"""Where `awq` puts rounded experts: packed in 4 bits, or as rounded values in their own weights for other bits."""

import dataclasses
from typing import Any, Protocol

from torch import Tensor, nn

from deepseek_training.compress.awq_search import fake_quantize
from modeling_deepseek.four_bit_experts import begin_four_bits, end_four_bits, find_format


@dataclasses.dataclass(frozen=True)
class Rounding:
    """A matrix about to be stored.

    Attributes:
        values: `[M, N]` in fp32, scaled and clipped.
        scales: `[M, G]` where the values are codes times these already; None: they are still to be rounded to nearest.
    """

    values: Tensor
    scales: Tensor | None = None

    def rounded(self, group_size: int, bits: int | None) -> Tensor:
        """Return the values after rounding, `[M, N]`.

        Args:
            group_size: Weights that share a scale.
            bits: None: nothing is rounded.
        """
        if bits is None or self.scales is not None:
            return self.values
        return fake_quantize(self.values, group_size, bits)

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
        """Round and keep one matrix.

        Args:
            name: Of the projection.
            expert: Its place.
            rounding: Of its matrix.
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
        """Round and keep one matrix: see `Store`."""
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
        self.experts, self.settings = experts, settings

    def put(self, name: str, expert: int, rounding: Rounding) -> None:
        """Round and keep one matrix: see `Store`."""
        rounded = rounding.rounded(self.settings.group_size, self.settings.bits)
        self.experts.get_parameter(name).data[expert].copy_(rounded)

    def close(self) -> None:
        """Nothing: the module computes as before."""
