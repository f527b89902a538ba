"""One decoder layer: DeepSeek-V3's, with our router, a choice of norm, and dropout.

`modeling_deepseek.py` and `mtp.py` stack them. Only differences from
`transformers/models/deepseek_v3/modeling_deepseek_v3.py` are stated here.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3DecoderLayer,
    DeepseekV3Experts,
    DeepseekV3MLP,
    DeepseekV3MoE,
    DeepseekV3RMSNorm,
)

from .configuration_deepseek import DeepseekConfig
from .conversion import fuse_expert_names
from .fused_expert_parallel import computes_unused_slots
from .routing import DeepseekRouter
from .training_pass import TrainingPass


def make_norm(config: DeepseekConfig, size: int, eps: float) -> nn.Module:
    """Return the normalization that `norm_type` names, over a last axis of `size`."""
    return nn.LayerNorm(size, eps=eps) if config.norm_type == "layernorm" else DeepseekV3RMSNorm(size, eps=eps)


class DeepseekMoE(DeepseekV3MoE):
    """Adds our router to DeepSeek-V3's mixture of routed and shared experts."""

    def __init__(self, config: DeepseekConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.experts = DeepseekV3Experts(config)
        self.experts.register_load_state_dict_pre_hook(fuse_expert_names)
        self.gate = DeepseekRouter(config)
        self.shared_experts = DeepseekV3MLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states: torch.Tensor, training_pass: TrainingPass | None = None) -> torch.Tensor:
        """Return the routed experts' weighted sum plus the shared experts.

        Args:
            hidden_states: `[B, S, D]`.
            training_pass: Handed to the router; None outside training.

        Returns:
            `[B, S, D]`.
        """
        # transformers' own expert parallelism looks up the process that has an expert, also where its weight is 0.
        marks_unused = not computes_unused_slots(self.experts)
        _, topk_weights, topk_indices = self.gate(hidden_states, training_pass, marks_unused=marks_unused)
        routed = self.experts(hidden_states.view(-1, hidden_states.shape[-1]), topk_indices, topk_weights)
        return routed.view_as(hidden_states) + self.shared_experts(hidden_states)


class DeepseekAttention(DeepseekV3Attention):
    """Lets `norm_type` choose the normalization of the latents."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.norm_type == "layernorm":
            # 1e-6 is what DeepSeek-V3's latent norms use, whatever rms_norm_eps says.
            self.kv_a_layernorm = make_norm(config, config.kv_lora_rank, 1e-6)
            if config.q_lora_rank is not None:
                self.q_a_layernorm = make_norm(config, config.q_lora_rank, 1e-6)


class DeepseekDecoderLayer(DeepseekV3DecoderLayer):
    """Adds dropout on both branches, and hands `training_pass` to the router."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        # Not DeepseekV3DecoderLayer's constructor: it would allocate the experts twice.
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = DeepseekAttention(config, layer_idx)
        self.is_moe = layer_idx >= config.first_k_dense_replace
        self.mlp = DeepseekMoE(config) if self.is_moe else DeepseekV3MLP(config)
        self.input_layernorm = make_norm(config, config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = make_norm(config, config.hidden_size, config.rms_norm_eps)
        # Identity draws no random numbers, so a run without dropout matches transformers' own.
        self.dropout = nn.Dropout(config.hidden_dropout) if config.hidden_dropout > 0 else nn.Identity()

    def forward(
        self, hidden_states: torch.Tensor, training_pass: TrainingPass | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Return the layer's output.

        Args:
            hidden_states: `[B, S, D]`.
            training_pass: Handed to the router; None outside training.
            **kwargs: As for `DeepseekV3DecoderLayer`.

        Returns:
            `[B, S, D]`.
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        normed = self.post_attention_layernorm(hidden_states)
        mixed = self.mlp(normed, training_pass) if self.is_moe else self.mlp(normed)
        return hidden_states + self.dropout(mixed)
