"""What a router counts while training: tokens an expert, and tokens in all.

`DeepseekRouter` owns one; the balancing bias, the expert-share controller and the logs read it. Surprising: the counts
are plain attributes, not buffers, because DistributedDataParallel overwrites buffers with rank 0's; and a layer that
activation checkpointing runs twice is counted once.
"""

import torch

from .token_layout import TokenLayout


class ExpertLoad:
    """Counts since the last optimizer step.

    Counted are passes in training mode with gradients: no evaluation, no rollout, no padding.

    Attributes:
        tokens_per_expert: `[E]` int64, used slots only; None until something is counted.
        num_tokens: Scalar int64 tensor, padding left out.
        num_passes: How many passes that makes.
        num_accumulation_steps: Passes that make one optimizer step; None where no callback has told.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.num_accumulation_steps = None
        self.reset()

    def reset(self) -> None:
        """Forget the counts."""
        self.tokens_per_expert, self.num_tokens = None, None
        self.num_passes = 0
        self.anchor_version = None
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
        topk_indices: torch.Tensor,
        is_used: torch.Tensor | None,
        layout: TokenLayout | None,
        anchor: torch.nn.Parameter,
    ) -> None:
        """Add one pass.

        Args:
            topk_indices: `[T, K]`, all valid.
            is_used: `[T, K]` bool; None: every slot.
            layout: Which tokens are padding; None: none is.
            anchor: A parameter that optimizer steps change in place.
        """
        if self.tokens_per_expert is None:
            self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.int64, device=topk_indices.device)
            self.num_tokens = torch.zeros((), dtype=torch.int64, device=topk_indices.device)
        counted = torch.ones_like(topk_indices) if is_used is None else is_used.long()
        if layout is None:
            self.num_tokens += len(topk_indices)
        else:
            counted = counted * layout.is_token.unsqueeze(1)
            self.num_tokens += layout.is_token.sum()
        # scatter_add_ rather than bincount: bincount waits for the GPU.
        self.tokens_per_expert.scatter_add_(0, topk_indices.flatten(), counted.flatten())
        self.anchor_version = anchor._version
        self.num_passes += 1

    def is_stale(self, anchor: torch.nn.Parameter) -> bool:
        """Return whether the optimizer has stepped since the last count, seen outside a backward pass.

        Args:
            anchor: The parameter that was given to `count`.
        """
        if self.num_tokens is None or torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return False
        return self.anchor_version != anchor._version

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
