"""What an expert does between its two products: which columns are gate and up, clamps, activation, shift.

    gate, up = h[:, :I], h[:, I:]                        interleaved: h[:, 0::2], h[:, 1::2]
    gate, up = min(gate, limit), clamp(up, -limit, limit)
    a = gate * sigmoid(alpha * gate) * (up + shift)      or gelu(gate) in place of the first two factors

h is what the first product gives, bias included; it is kept for the backward pass as it is before the clamps. With the
defaults nothing but activation and product is left, and nothing else runs. Custom operators take no structures, so
between them an `Epilogue` travels as its `text`.

R rows, I expert width.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_kernels.activations import (
    activation_backward_into,
    activation_into,
    apply_activation,
    canonical_activation,
)


@dataclass(frozen=True)
class Epilogue:
    """The form of a gated expert.

    Attributes:
        activation: ``silu``, ``gelu`` or ``gelu_pytorch_tanh`` (transformers' names).
        limit: Where the gate is cut off above, and up on both sides; None for no clamp. DeepSeek-V4, GPT-OSS: 7.0.
        alpha: Inside silu's sigmoid. GPT-OSS: 1.702.
        shift: Added to up. GPT-OSS: 1.0.
        is_interleaved: Whether rows of the weights alternate, gate before up, in place of all gates before all ups.

    Raises:
        ValueError: A value out of range, or two that contradict one another.
    """

    activation: str = "silu"
    limit: float | None = None
    alpha: float = 1.0
    shift: float = 0.0
    is_interleaved: bool = False

    def __post_init__(self) -> None:
        name = canonical_activation(self.activation)
        object.__setattr__(self, "activation", name)
        for what, value in (("limit", self.limit), ("alpha", self.alpha), ("shift", self.shift)):
            if not isinstance(value, (int, float)) and not (what == "limit" and value is None):
                raise ValueError(f"{what}: got {value!r}, expected a number")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ValueError(f"limit: got {self.limit}, expected a finite number above 0, or None for no clamp")
        if not (0 < self.alpha < math.inf):
            raise ValueError(f"alpha: got {self.alpha}, expected a finite number above 0")
        if not math.isfinite(self.shift):
            raise ValueError(f"shift: got {self.shift}, expected a finite number")
        if self.alpha != 1 and name != "silu":
            raise ValueError(f"alpha: got {self.alpha} with activation {name!r}, expected 1; only silu has a sigmoid")

    @property
    def is_plain(self) -> bool:
        """Whether nothing but activation and product is left."""
        return self == Epilogue(self.activation)

    @property
    def text(self) -> str:
        """The same as one text, what custom operators take; a plain one is the activation's canonical name."""
        parts = [self.activation]
        if self.limit is not None:
            parts.append(f"limit={float(self.limit)!r}")
        if self.alpha != 1:
            parts.append(f"alpha={float(self.alpha)!r}")
        if self.shift != 0:
            parts.append(f"shift={float(self.shift)!r}")
        if self.is_interleaved:
            parts.append("is_interleaved")
        return " ".join(parts)

    @staticmethod
    @functools.cache
    def read(text: str) -> "Epilogue":
        """Return the epilogue of a `text`.

        Args:
            text: From `text`.
        """
        activation, *parts = text.split(" ")
        settings: dict[str, float | bool] = {}
        for part in parts:
            name, _, value = part.partition("=")
            settings[name] = float(value) if value else True
        return Epilogue(activation, **settings)  # type: ignore[arg-type]

    def columns(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns of gate and of up, views of `h` [R, 2I].

        Args:
            h: [R, 2I], or a gradient of that shape.
        """
        if self.is_interleaved:
            return h[:, 0::2], h[:, 1::2]
        width = h.shape[1] // 2
        return h[:, :width], h[:, width:]

    def split(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate and up as they enter activation and product: clamped and shifted, views of `h` where neither.

        Args:
            h: [R, 2I].
        """
        gate, up = self.columns(h)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate, up + self.shift if self.shift != 0 else up

    def apply(self, h: Tensor) -> Tensor:
        """Return ``a`` [R, I], differentiable.

        Args:
            h: [R, 2I].
        """
        gate, up = self.split(h)
        if self.alpha != 1:
            return gate * torch.sigmoid(self.alpha * gate) * up
        return apply_activation(gate, self.activation) * up

    def activate_into(self, gate: Tensor, out: Tensor) -> None:
        """Write the activation of `gate` into `out`.

        Args:
            gate: From `split`.
            out: Of the same shape; may be `gate`.
        """
        if self.alpha == 1:
            activation_into(gate, self.activation, out)
        else:
            scaled = gate * self.alpha
            activation_into(scaled, self.activation, out)
            out.div_(self.alpha)

    def activate_backward_into(self, grad: Tensor, gate: Tensor, out: Tensor) -> None:
        """Write ``grad`` times the activation's derivative at `gate` into `out`.

        Args:
            grad: Gradient of the activation's result.
            gate: From `split`.
            out: Of the same shape; may be a slice.
        """
        activation_backward_into(grad, gate if self.alpha == 1 else gate * self.alpha, self.activation, out)

    def mask_gradient(self, grad_gate: Tensor, grad_up: Tensor, h: Tensor) -> None:
        """Zero, in place, what does not pass the clamps.

        Args:
            grad_gate: [R, I], gradient of the clamped gate.
            grad_up: [R, I], that of the clamped up.
            h: [R, 2I], before the clamps.
        """
        if self.limit is not None:
            gate, up = self.columns(h)
            grad_gate.masked_fill_(~(gate <= self.limit), 0)
            grad_up.masked_fill_(~(up.abs() <= self.limit), 0)


def epilogue_text(activation: str | Epilogue) -> str:
    """Return the text of an epilogue, or of the plain one with that activation.

    Args:
        activation: Of `fused_moe`.
    """
    return activation.text if isinstance(activation, Epilogue) else canonical_activation(activation)
