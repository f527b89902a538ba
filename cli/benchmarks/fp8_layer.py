"""One MoE layer for the benchmark of FP8: its operands, and steps of bf16 and FP8 that mark their parts.

``fp8_on_gpu`` and ``fp8_kernels`` call it. The kernels are called below the autograd of ``fused_moe``, so that codes
of weights can be given, and both are called alike.

T tokens, H hidden, I expert width, E experts, K slots per token, S = T*K rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek_cli.benchmarks.kernel_timing import Mark
from deepseek_kernels.cpu.fp8_experts import Weights
from deepseek_kernels.gpu import experts as bf16_experts
from deepseek_kernels.gpu import fp8_experts

ACTIVATION = "silu"


@dataclass
class Layer:
    """One layer's operands, its routing and the codes of its weights."""

    shape: tuple[int, ...]
    x: Tensor
    grad: Tensor
    weights: Weights
    indices: Tensor
    topk_weights: Tensor
    needs: tuple[bool, ...] = (True, True, True, True, False)

    @staticmethod
    def make(shape: tuple[int, ...], device: str) -> "Layer":
        """Return a layer of random weights with balanced routing.

        Args:
            shape: T, H, I, E, K.
            device: Where.
        """
        num_tokens, hidden, width, num_experts, num_slots = shape
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            made = torch.empty(size, device=device, dtype=torch.bfloat16)
            return made.normal_(generator=generator).mul_(scale)

        gate_up = normal(num_experts, 2 * width, hidden, scale=hidden**-0.5)
        down = normal(num_experts, hidden, width, scale=width**-0.5)
        scores = torch.rand(num_tokens, num_experts, generator=generator, device=device)
        topk_weights = torch.rand(num_tokens, num_slots, generator=generator, device=device) / num_slots
        x, grad = normal(num_tokens, hidden), normal(num_tokens, hidden)
        return Layer(shape, x, grad, Weights(gate_up, down), scores.topk(num_slots).indices, topk_weights)

    @staticmethod
    def untouched(shape: tuple[int, ...]) -> "Layer":
        """Return a layer for compiling alone: on the CPU, of memory that is never read, and so costs nothing.

        Args:
            shape: T, H, I, E, K.
        """
        num_tokens, hidden, width, num_experts, num_slots = shape
        sizes = ((num_tokens, hidden), (num_experts, 2 * width, hidden), (num_experts, hidden, width))
        x, gate_up, down = (torch.empty(size, dtype=torch.bfloat16) for size in sizes)
        indices = torch.zeros(num_tokens, num_slots, dtype=torch.int64)
        needs = (True, True, True, False, False)  # the fourth reads indices that no kernel has written
        return Layer(shape, x, x, Weights(gate_up, down), indices, torch.ones(indices.shape), needs)

    def bf16_step(self, is_training: bool, mark: Mark) -> tuple[Any, ...]:
        """Run `fused_moe`'s kernels; the forward's output and the gradients.

        Args:
            is_training: Whether with the backward pass.
            mark: Called around every part.
        """
        mark()
        matrices = (self.weights.gate_up, self.weights.down)
        output, kept, order = bf16_experts.forward(
            self.x, *matrices, self.indices, self.topk_weights, ACTIVATION, is_training
        )
        mark()
        if not is_training:
            return (output,)
        assert order is not None  # what is kept is sorted
        grads = bf16_experts.backward(
            self.grad, self.x, *matrices, order, self.topk_weights, kept, ACTIVATION, list(self.needs)
        )
        mark()
        return output, *grads

    def fp8_step(self, codes: tuple[Any, Any], is_training: bool, mark: Mark) -> tuple[Any, ...]:
        """Run `fused_moe_fp8`'s kernels; the forward's output and the gradients.

        Args:
            codes: Of the weights and of their transposes; None for either makes them anew.
            is_training: Whether with the backward pass.
            mark: Called around every part.
        """
        mark()
        order = fp8_experts.route(self.indices, self.shape[3])
        output, kept = fp8_experts.forward(
            self.x, self.weights, order, self.topk_weights, ACTIVATION, None, is_training, codes[0]
        )
        mark()
        if not is_training:
            return (output,)
        grads = fp8_experts.backward(
            self.grad, self.x, self.weights, order, self.topk_weights, kept, ACTIVATION, self.needs, codes[1]
        )
        mark()
        return output, *grads


def make_codes(weights: Weights) -> tuple[Any, Any]:
    """Return the codes of both projections, and those of their transposes.

    Args:
        weights: Both projections.
    """
    plain, turned = (
        (fp8_experts.gate_up_codes(weights, transpose=turn), fp8_experts.down_codes(weights, transpose=turn))
        for turn in (False, True)
    )
    return plain, turned


def teraflops(shape: tuple[int, ...], products: int, milliseconds: float) -> float:
    """Return the rate of so many products of S x H by H x I.

    Args:
        shape: T, H, I, E, K.
        products: Three in the forward pass, six in the backward pass.
        milliseconds: They took.
    """
    num_tokens, hidden, width, _, num_slots = shape
    return 2 * products * num_tokens * num_slots * hidden * width / milliseconds / 1e9
