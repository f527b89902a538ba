"""The down projections' biases: what a token gets of them depends on nothing but its experts and their weights.

``sum_k w[t, k] * (y + bias[e])`` is ``sum_k w[t, k] * y`` plus one product of [T, E] with [E, H], which autograd
differentiates: 1 / (3I) of the layer's arithmetic for every expert not chosen. So no kernel knows of these biases.

T tokens, K slots per token, H hidden, E experts.
"""

import torch
from torch import Tensor


def routed_bias(down_bias: Tensor, topk_indices: Tensor, topk_weights: Tensor) -> Tensor:
    """Return ``out[t] = sum_k w[t, k] * down_bias[topk_indices[t, k]]`` [T, H], differentiable in both floats.

    Args:
        down_bias: [E, H].
        topk_indices: [T, K]; negative or at least E means unused, and its weight may be anything.
        topk_weights: [T, K].
    """
    num_experts, dtype = down_bias.shape[0], down_bias.dtype
    is_used = (topk_indices >= 0) & (topk_indices < num_experts)
    weights = torch.where(is_used, topk_weights, 0).to(dtype)
    shares = weights.new_zeros(topk_indices.shape[0], num_experts)
    indices = topk_indices.clamp(0, num_experts - 1).long()
    return shares.scatter_add(1, indices, weights) @ down_bias
