"""What a router chose, read from what it returns.

`RoutingObserver` reads every router in training through it, `RoutingCounts` every router that serves. Most families
return `(router_logits, topk_weights, topk_indices)`; a few older ones return a table or counts. DBRX, Doge and others
return no choice at all: of these nothing can be counted.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RouterChoice:
    """A router's choice for T tokens.

    Attributes:
        router_logits: `[T, E]`; of a router that can choose to skip, one column more.
        topk_weights: `[T, K]`, or None where the router returns a table.
        topk_indices: `[T, K]` int64, or None likewise. An unused slot has weight 0 or the index E.
        is_chosen: `[T, E]` bool, in place of the two.
        load: `[E]` int64, in place of all three.
    """

    router_logits: torch.Tensor
    topk_weights: torch.Tensor | None = None
    topk_indices: torch.Tensor | None = None
    is_chosen: torch.Tensor | None = None
    load: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router_logits.shape[-1]

    @property
    def is_used(self) -> torch.Tensor:
        """`[T, K]` bool."""
        assert self.topk_weights is not None and self.topk_indices is not None
        return (self.topk_weights != 0) & (self.topk_indices < self.num_experts)

    # No bincount, boolean index or comparison of values below: they would wait for the GPU.

    def tokens_per_expert(self, is_token: torch.Tensor | None, num_experts: int) -> torch.Tensor:
        """Return the load `[E]` int64.

        Args:
            is_token: `[T]` bool, False for padding; None: no padding. Ignored where the router returns a load.
            num_experts: E.
        """
        if self.load is not None:
            return self.load
        if self.is_chosen is not None:
            chosen = self.is_chosen if is_token is None else self.is_chosen & is_token.unsqueeze(1)
            return chosen.sum(0)
        used = self.is_used if is_token is None else self.is_used & is_token.unsqueeze(1)
        assert self.topk_indices is not None
        load = torch.zeros(num_experts, dtype=torch.int64, device=used.device)
        return load.scatter_add_(0, self.topk_indices.clamp(max=num_experts - 1).flatten(), used.flatten().long())

    def tokens_per_count(self, is_token: torch.Tensor | None, max_experts: int) -> torch.Tensor:
        """Return how many tokens used 0, 1, ... `max_experts` experts, `[max_experts + 1]` int64."""
        used = self.is_used
        ones = torch.ones_like(used[:, 0], dtype=torch.int64) if is_token is None else is_token.long()
        counts = torch.zeros(max_experts + 1, dtype=torch.int64, device=ones.device)
        return counts.scatter_add_(0, used.sum(1), ones)

    def entropies(self) -> torch.Tensor:
        """Return each token's entropy of the softmax over all experts' logits, `[T]` fp32 in nats.

        Where a model records probabilities in place of logits (Gemma 4), of these.
        """
        logits = self.router_logits.float()
        is_probability = ((logits >= 0).all() & ((logits.sum(-1) - 1).abs() < 1e-3).all()).to(logits)
        shares = is_probability * logits + (1 - is_probability) * logits.softmax(-1)
        return torch.special.entr(shares.clamp(min=0)).sum(-1)


def read_choice(output: object, place: int) -> RouterChoice | None:
    """Return a router's choice; None if its output does not tell it.

    Args:
        output: What the router returned.
        place: Where in it the logits stand.
    """
    if not isinstance(output, (tuple, list)):
        return None
    router_logits, others = output[place], [*output[:place], *output[place + 1 :]]
    num_experts = router_logits.shape[-1]
    router_logits = router_logits.reshape(-1, num_experts)
    slots = read_slots(output, place)
    if slots is not None:
        return RouterChoice(router_logits, topk_weights=slots[1], topk_indices=slots[0])
    tables = [part for part in others if getattr(part, "shape", None) == output[place].shape]
    if tables:
        # One column per expert, zero where it is not chosen: Llama 4's scores, Switch's mask. NLLB-MoE has a mask of
        # the first expert and, behind it, the weights of both.
        return RouterChoice(router_logits, is_chosen=tables[-1].reshape(-1, num_experts) != 0)
    counts = [part for part in others if isinstance(part, list) and len(part) == num_experts]
    if counts:
        return RouterChoice(router_logits, load=torch.tensor(counts[0], device=router_logits.device))  # JetMoe
    return None


def read_slots(output: object, place: int) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """Return the experts `[T, K]`, their weights `[T, K]` and E, as most routers tell them; None: another form.

    It does less than `read_choice` does, for what is called in every step of a generation.

    Args:
        output: What the router returned.
        place: Where in it the logits stand.
    """
    if place != 0 or not isinstance(output, (tuple, list)) or len(output) < 3:
        return None
    logits, weights, indices = output[:3]
    if not isinstance(indices, torch.Tensor) or indices.is_floating_point():
        return None
    num_experts = logits.shape[-1]
    if indices.ndim != 2 or weights.ndim != 2:
        num_tokens = logits.numel() // num_experts
        weights, indices = weights.reshape(num_tokens, -1), indices.reshape(num_tokens, -1)
    return indices, weights, num_experts
