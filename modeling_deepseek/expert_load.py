"""What a router counts while training: tokens an expert, experts a token, its entropy, and tokens in all.

`DeepseekRouter` owns one; the balancing bias, the expert-share controller and the logs read it. Surprising: the counts
are plain attributes, not buffers, because DistributedDataParallel overwrites buffers with rank 0's; and a layer that
activation checkpointing runs twice is counted once.
"""

import torch

from .token_layout import TokenLayout

# Entropies are added up as whole numbers of this part of a nat: integers sum to the same in any order, on any ranks.
ENTROPY_UNIT = 2.0**-20


class ExpertLoad:
    """Counts since the last optimizer step.

    Counted are passes in training mode with gradients: no evaluation, no rollout, no padding.

    Args:
        num_experts: E.
        num_slots: K, the most experts a token uses.

    Attributes:
        tokens_per_expert: `[E]` int64, used slots only; None until something is counted.
        tokens_per_count: `[K + 1]` int64, how many tokens used 0, 1, ... K experts.
        entropy: Scalar int64 tensor in `ENTROPY_UNIT`, the tokens' sum; of the softmax over all experts' logits.
        num_tokens: Scalar int64 tensor, padding left out.
        num_passes: How many passes that makes.
        num_accumulation_steps: Passes that make one optimizer step; None where no callback has told.
    """

    def __init__(self, num_experts: int, num_slots: int) -> None:
        self.num_experts, self.num_slots = num_experts, num_slots
        self.num_accumulation_steps = None
        self.reset()

    def reset(self) -> None:
        """Forget the counts."""
        self.tokens_per_expert, self.tokens_per_count, self.entropy, self.num_tokens = None, None, None, None
        self.num_passes = 0
        self.anchor_version, self._anchor_sample = None, None
        self._is_counted_outside_backward = False

    @property
    def loss_scale(self) -> float:
        """What an auxiliary loss is multiplied by, so that a step's gradient does not depend on accumulation.

        Where nobody has told the number of passes a step, only the first one after an optimizer step bears the
        losses: the right size on average, from fewer tokens.
        """
        if self.num_accumulation_steps is not None:
            return 1 / self.num_accumulation_steps
        return 1.0 if self.num_passes <= 1 else 0.0

    @torch.no_grad()
    def count(
        self,
        router_logits: torch.Tensor,
        topk_indices: torch.Tensor,
        is_used: torch.Tensor | None,
        layout: TokenLayout | None,
        anchor: torch.nn.Parameter,
    ) -> None:
        """Add one pass.

        Args:
            router_logits: `[T, E]`.
            topk_indices: `[T, K]`, all valid.
            is_used: `[T, K]` bool; None: every slot.
            layout: Which tokens are padding; None: none is.
            anchor: A parameter that optimizer steps change in place.
        """
        if self.tokens_per_expert is None:
            self._begin(topk_indices.device)
        counted = torch.ones_like(topk_indices) if is_used is None else is_used.long()
        entropies = (torch.special.entr(router_logits.float().softmax(-1)).sum(-1) / ENTROPY_UNIT).round().long()
        if layout is None:
            is_token = torch.ones_like(topk_indices[:, 0])
        else:
            is_token = layout.is_token.long()
            counted = counted * is_token.unsqueeze(1)
            entropies = entropies * is_token
        # scatter_add_ rather than bincount: bincount waits for the GPU.
        self.tokens_per_expert.scatter_add_(0, topk_indices.flatten(), counted.flatten())
        self.tokens_per_count.scatter_add_(0, counted.sum(1), is_token)
        self.entropy += entropies.sum()
        self.num_tokens += is_token.sum()
        self.anchor_version, self._anchor_sample = anchor._version, _sample(anchor)
        self.num_passes += 1

    def _begin(self, device: torch.device) -> None:
        whole = {"dtype": torch.int64, "device": device}
        self.tokens_per_expert = torch.zeros(self.num_experts, **whole)
        self.tokens_per_count = torch.zeros(self.num_slots + 1, **whole)
        self.entropy, self.num_tokens = torch.zeros((), **whole), torch.zeros((), **whole)

    def as_row(self, device: torch.device) -> torch.Tensor:
        """Return all counts in one row, `[E + K + 3]` int64: an expert, a number of experts, entropy, tokens.

        Args:
            device: Of the row, if nothing is counted.
        """
        if self.tokens_per_expert is None:
            return torch.zeros(self.num_experts + self.num_slots + 3, dtype=torch.int64, device=device)
        return torch.cat([self.tokens_per_expert, self.tokens_per_count, torch.stack([self.entropy, self.num_tokens])])

    def is_stale(self, anchor: torch.nn.Parameter) -> bool:
        """Return whether the optimizer has stepped since the last count, seen outside a backward pass.

        Args:
            anchor: The parameter that was given to `count`.
        """
        if self.num_tokens is None or torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return False
        if self.anchor_version != anchor._version:
            return True
        # Fused optimizers, Trainer's default, leave the version alone. Comparing waits for a GPU; with a callback,
        # which resets the counts itself, there is no need to.
        return self.num_accumulation_steps is None and not torch.equal(self._anchor_sample, _sample(anchor))

    def admits(self, training: bool) -> bool:
        """Return whether the pass now running is to be counted.

        Non-reentrant checkpointing runs a layer with gradients twice, the second time inside the backward pass; the
        reentrant kind runs it first without gradients, so that only the run inside the backward pass can be told from
        a rollout. Hence: inside a backward pass, count only if nothing was counted outside one.

        Args:
            training: The module's mode.
        """
        if not training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if torch._C._current_graph_task_id() != -1:
            return not self._is_counted_outside_backward
        self._is_counted_outside_backward = True
        return True


def _sample(anchor: torch.nn.Parameter) -> torch.Tensor:
    """A copy of one column, which any optimizer step changes."""
    return anchor.detach()[:, 0].clone()
