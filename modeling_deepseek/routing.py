"""The router: the experts of each token, their number and their weights.

`DeepseekMoE` calls it. With default settings it computes what transformers' `DeepseekV3TopkRouter` computes, bit for
bit. An expert that a token does not use keeps a valid index and gets weight 0, because transformers' `grouped_mm`
turns an out-of-range index into NaN and `batched_mm` into an IndexError. Only our `fused_moe`, which skips such slots,
is given the index `num_experts`.

Axes: T tokens, D hidden, E experts, K = `num_experts_per_tok` slots.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from .auxiliary_loss import AttachLoss, router_z_loss, sequence_balance_loss
from .configuration_deepseek import DeepseekConfig
from .expert_share import ExpertShareController, restore_float32
from .token_layout import TokenLayout, one_sequence
from .training_pass import TrainingPass

# Experts implementations for which an index of E and more is an unused slot.
_TAKE_UNUSED = ("fused_moe", "fused_moe_fp8")


class DeepseekRouter(DeepseekV3TopkRouter):
    """Chooses experts by sigmoid or softmax scores of a linear gate or of attention over expert keys.

    Buffers stay fp32 whatever the model's dtype: in bf16 the balancing bias stops moving (0.5 + 0.001 = 0.5).

    Args:
        config: The model's configuration.

    Reference:
        DeepSeek-AI 2024, arXiv 2412.19437, section 2.1.2 (sigmoid, bias, groups). Huang et al. 2024,
        arXiv 2403.07652 (experts by cumulative share; there over all experts, here over the K best). DeepSeek-AI 2024,
        arXiv 2405.04434, section 2.2 (softmax, groups by their best expert).
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.config = config
        self.scoring_func = config.scoring_func
        self.topk_method = config.topk_method
        self.e_score_correction_bias = nn.Buffer(torch.zeros(self.num_experts, dtype=torch.float32))
        self.key_dim = config.router_key_dim
        if self.key_dim is not None:
            del self.weight
            self.query_weight = nn.Parameter(torch.zeros(self.key_dim, self.hidden_dim))
            self.expert_keys = nn.Parameter(torch.zeros(self.num_experts, self.key_dim))
        self.share = ExpertShareController(config) if config.has_dynamic_experts else None

    def forward(
        self, hidden_states: torch.Tensor, training_pass: TrainingPass | None = None, *, marks_unused: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route each token.

        Args:
            hidden_states: `[..., D]`.
            training_pass: Sequences, padding and the weight of the auxiliary losses. Padding is routed but in no
                loss. None: one sequence, weight 1.
            marks_unused: Whether the experts may be given an index that is none of theirs.

        Returns:
            `router_logits` `[T, E]` fp32, `topk_weights` `[T, K]` fp32 and `topk_indices` `[T, K]`; an unused slot
            has weight 0.
        """
        is_used = None
        if self.is_extended:
            router_logits = self.compute_logits(hidden_states)
            scores = self._score(router_logits)
            topk_indices = self.choose_experts(scores)
            is_used = self._choose_number(router_logits, scores, topk_indices)
            topk_weights = self._weigh(router_logits, scores, topk_indices, is_used) * self.routed_scaling_factor
        else:
            router_logits, topk_weights, topk_indices = super().forward(hidden_states)
        if self.training and self.has_losses and torch.is_grad_enabled():
            loss = self._loss(router_logits, topk_indices, is_used, training_pass)
            topk_weights = AttachLoss.apply(topk_weights, loss)
        if is_used is not None and marks_unused and self.config._experts_implementation in _TAKE_UNUSED:
            topk_indices = topk_indices.masked_fill(~is_used, self.num_experts)
        return router_logits, topk_weights, topk_indices

    @property
    def has_losses(self) -> bool:
        """True if any auxiliary loss has a weight."""
        return self.config.seq_aux_loss_coef > 0 or self.config.router_z_loss_coef > 0

    @property
    def is_extended(self) -> bool:
        """True if any setting departs from DeepSeek-V3's router."""
        is_like_v3 = self.scoring_func == "sigmoid" and self.topk_method != "group_limited_greedy"
        return self.share is not None or not is_like_v3 or self.key_dim is not None

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return `router_logits` `[T, E]` in fp32: `x W^T`, or with `router_key_dim` d, `(x Q^T) K^T / sqrt(d)`.

        Args:
            hidden_states: `[..., D]`.
        """
        hidden_states = hidden_states.view(-1, self.hidden_dim).float()
        if self.key_dim is None:
            return F.linear(hidden_states, self.weight.float())
        queries = F.linear(hidden_states, self.query_weight.float())
        return F.linear(queries, self.expert_keys.float()) / math.sqrt(self.key_dim)

    def choose_experts(self, scores: torch.Tensor) -> torch.Tensor:
        """Return `topk_indices` `[T, K]`, best first, by `scores + e_score_correction_bias` within the best groups.

        A group's worth is the sum of its two best experts, as in DeepSeek-V3, or its best one, as in V2.

        Args:
            scores: `[T, E]`.
        """
        choice = scores + self.e_score_correction_bias
        if self.num_group > 1:
            groups = choice.view(-1, self.num_group, self.num_experts // self.num_group)
            num_judged = 1 if self.topk_method == "group_limited_greedy" else 2
            best = groups.topk(num_judged, dim=-1)[0].sum(-1).topk(self.topk_group, dim=-1, sorted=False)[1]
            is_open = torch.zeros(groups.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
            choice = groups.masked_fill(~is_open.unsqueeze(-1), float("-inf")).flatten(1)
        return choice.topk(self.top_k, dim=-1)[1]

    def _choose_number(
        self, router_logits: torch.Tensor, scores: torch.Tensor, topk_indices: torch.Tensor
    ) -> torch.Tensor | None:
        """Used slots `[T, K]`, or None for all of them."""
        if self.share is None:
            return None
        with torch.no_grad():
            weights = self._weigh(router_logits, scores, topk_indices, None)
            return self.share(weights / weights.sum(-1, keepdim=True))

    def _score(self, router_logits: torch.Tensor) -> torch.Tensor:
        """`scores` `[T, E]`."""
        return router_logits.sigmoid() if self.scoring_func == "sigmoid" else router_logits.softmax(-1)

    def _loss(
        self,
        router_logits: torch.Tensor,
        topk_indices: torch.Tensor,
        is_used: torch.Tensor | None,
        training_pass: TrainingPass | None,
    ) -> torch.Tensor:
        """The weighted auxiliary losses of this pass, scaled to its part of an optimizer step."""
        layout, weight = (one_sequence(router_logits), 1.0) if training_pass is None else training_pass
        loss = router_logits.new_zeros(())
        if self.config.seq_aux_loss_coef > 0:
            balance = sequence_balance_loss(self._score(router_logits), topk_indices, is_used, layout)
            loss = loss + self.config.seq_aux_loss_coef * balance
        if self.config.router_z_loss_coef > 0:
            loss = loss + self.config.router_z_loss_coef * router_z_loss(router_logits, layout)
        return loss * weight

    def balance_loss(self, router_logits: torch.Tensor, layout: TokenLayout | None) -> torch.Tensor:
        """Return the sequence-wise balance loss of given logits, unweighted.

        Args:
            router_logits: `[T, E]`.
            layout: Sequences and padding; None: one sequence.
        """
        layout = one_sequence(router_logits) if layout is None else layout
        scores = self._score(router_logits)
        topk_indices = self.choose_experts(scores)
        is_used = self._choose_number(router_logits, scores, topk_indices)
        return sequence_balance_loss(scores, topk_indices, is_used, layout)

    @torch.no_grad()
    def finish_step(self, tokens_per_expert: torch.Tensor, num_tokens: int, speed: float | None = None) -> None:
        """Update bias and share once after an optimizer step.

        Args:
            tokens_per_expert: `[E]`, of all data-parallel ranks.
            num_tokens: Likewise, padding left out; with 0 nothing is updated.
            speed: In place of the configuration's `router_bias_update_speed`.
        """
        if num_tokens == 0:
            return
        speed = self.config.router_bias_update_speed if speed is None else speed
        move_bias(self.e_score_correction_bias, tokens_per_expert, speed)
        if self.share is not None:
            self.share.step(float(tokens_per_expert.sum() / num_tokens))

    def _weigh(
        self,
        router_logits: torch.Tensor,
        scores: torch.Tensor,
        topk_indices: torch.Tensor,
        is_used: torch.Tensor | None,
    ) -> torch.Tensor:
        """Weights `[T, K]` of the chosen experts, zero where `is_used` is False, before scaling."""
        if self.scoring_func == "softmax" and self.norm_topk_prob:
            logits = router_logits.gather(1, topk_indices)
            return (logits if is_used is None else logits.masked_fill(~is_used, float("-inf"))).softmax(-1)
        weights = scores.gather(1, topk_indices)
        if is_used is not None:
            weights = weights * is_used
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) if self.norm_topk_prob else weights

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Set the weights' and buffers' first values.

        Keys of unit variance give logits the spread that a linear gate of the same `std` has.

        Args:
            std: Standard deviation of the gate's or the query's weights.
        """
        init.zeros_(self.e_score_correction_bias)
        if self.share is not None:
            self.share.reset_state()
        if self.key_dim is None:
            init.normal_(self.weight, mean=0.0, std=std)
        else:
            init.normal_(self.query_weight, mean=0.0, std=std)
            init.normal_(self.expert_keys, mean=0.0, std=1.0)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "DeepseekRouter":
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        self.e_score_correction_bias = restore_float32(before, self.e_score_correction_bias)
        return self


@torch.no_grad()
def move_bias(bias: torch.Tensor, tokens_per_expert: torch.Tensor, speed: float) -> None:
    """Move a balancing bias against the load, in place, centered so that its mean stays where it is.

    ::

        d_i = speed * sign(mean load - load_i),    b_i <- b_i + d_i - mean(d)

    Args:
        bias: `[E]`, fp32.
        tokens_per_expert: `[E]`, of all data-parallel ranks.
        speed: 0 leaves the bias alone; DeepSeek-V3 uses 0.001.

    Reference:
        Wang et al. 2024, arXiv 2408.15664, algorithm 1.
    """
    if speed > 0:
        load = tokens_per_expert.to(bias)
        delta = speed * torch.sign(load.mean() - load)
        bias += delta - delta.mean()
