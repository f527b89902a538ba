"""The router's auxiliary losses, and how their gradients get into a training step that does not know of them.

`DeepseekRouter` calls these. Surprising: the losses are never added to the model's loss. TRL's chunked cross-entropy
replaces the model's own loss, `Trainer` divides it by accumulation steps and multiplies it by ranks; a gradient
attached to the router's output suffers none of that.
"""

from typing import Any

import torch

from .token_layout import TokenLayout


class AttachLoss(torch.autograd.Function):
    """Passes a tensor through, and in the backward pass adds the gradient of a loss to it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Return `tensor`.

        Args:
            ctx: Autograd's.
            tensor: Anything on the way to the model's output.
            loss: Scalar.
        """
        ctx.dtype = loss.dtype
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient as it came, and 1 for the loss.

        Args:
            ctx: Autograd's.
            gradient: Of the tensor.
        """
        return gradient, torch.ones((), dtype=ctx.dtype, device=gradient.device)


def sequence_balance_loss(
    scores: torch.Tensor, topk_indices: torch.Tensor, is_used: torch.Tensor | None, layout: TokenLayout
) -> torch.Tensor:
    """Return how unevenly each sequence's tokens spread over the experts; 1 when they spread evenly.

    For each sequence of T tokens, then averaged over sequences::

        f_i = E / (k T) * number of tokens sent to i,   P_i = mean over t of s_it / sum_j s_jt,   loss = sum_i f_i P_i

    Args:
        scores: `[T, E]`, without the balancing bias.
        topk_indices: `[T, K]`.
        is_used: `[T, K]` bool; None: every slot. k is the sequence's mean number of used slots.
        layout: Sequences and padding.

    Returns:
        Scalar. The gradient flows through P; f counts.

    Reference:
        DeepSeek-AI 2024, arXiv 2412.19437, equations 17 to 20 (there k is fixed).
    """
    with torch.no_grad():
        sent = torch.zeros_like(scores)
        sent.scatter_(1, topk_indices, torch.ones_like(topk_indices, dtype=scores.dtype) if is_used is None
                      else is_used.to(scores.dtype))  # fmt: skip
        sent = layout.mean(sent)
        fractions = scores.shape[1] * sent / sent.sum(1, keepdim=True).clamp(min=1e-20)
    shares = layout.mean(scores / (scores.sum(1, keepdim=True) + 1e-20))
    return layout.mean_over_sequences((fractions * shares).sum(1))


def router_z_loss(router_logits: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Return the mean of `logsumexp(router_logits)^2`, which keeps the logits small.

    Averaged over each sequence and then over sequences, so that accumulating batches of unequal lengths adds up to the
    same loss; the paper averages over tokens.

    Args:
        router_logits: `[T, E]`.
        layout: Sequences and padding.

    Reference:
        Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, equation 5.
    """
    squares = router_logits.logsumexp(1).square()
    return layout.mean_over_sequences(layout.mean(squares.unsqueeze(1)).squeeze(1))
