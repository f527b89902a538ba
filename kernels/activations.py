"""The gate activations of SwiGLU-like experts, and their derivatives, on torch's side.

``cpu/experts.py`` and the plain references call this; the Triton kernels have the same in ``gpu/triton_numerics.py``.
Everything has an ``out`` or works in place, for on a CPU the page faults of a fresh 50 MB buffer cost more
than the arithmetic done in it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# transformers' names on the left; ACT2FN maps several names to one function.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def canonical_activation(activation: str) -> str:
    """Return the one name of three under which the kernels know this activation.

    Args:
        activation: A name as transformers' ``hidden_act`` spells it.

    Raises:
        ValueError: The activation is none of those the kernels compute.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]


def apply_activation(gate: Tensor, activation: str) -> Tensor:
    """Return ``activation(gate)``, differentiable.

    Args:
        gate: Any shape.
        activation: A canonical name.
    """
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def activation_into(gate: Tensor, activation: str, out: Tensor) -> None:
    """Write ``activation(gate)`` into `out`.

    Args:
        gate: Any shape and strides.
        activation: A canonical name.
        out: Of the same shape.
    """
    if activation == "silu":
        torch.ops.aten.silu.out(gate, out=out)
    else:
        torch.ops.aten.gelu.out(gate, approximate="tanh" if activation == "gelu_tanh" else "none", out=out)


def activation_backward_into(grad: Tensor, gate: Tensor, activation: str, out: Tensor) -> None:
    """Write ``grad * activation'(gate)`` into `out`.

    Args:
        grad: Gradient of the activation's result.
        gate: The activation's argument.
        activation: A canonical name.
        out: Of the same shape; may be a slice.
    """
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=out)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        torch.ops.aten.gelu_backward.grad_input(grad, gate, approximate=approximate, grad_input=out)
