"""A causal language model as a graph of tensors: token ids, mask and cache in, logits and cache out.

`onnx_export.py` and `executorch_export.py` trace it. transformers hands its cache about as an object and makes masks
of many kinds; a graph has tensors only, so both are spelled out here. With latent attention the cache holds what
transformers caches: the normed latent and the rotated part of the key, one head each.

Axes: B batch, P tokens in the cache, S new tokens, L layers of experts, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from modeling_deepseek.families import find_moe_layers
from modeling_deepseek.four_bit_experts import has_four_bits

# Each was exported and compared with transformers by tests/serving/edge. Not transformers' deepseek_v2:
# it rotates by a product of complex numbers, which ONNX has not.
MODEL_TYPES = ("deepseek_moe", "deepseek_v3", "glm4_moe", "mixtral", "olmoe", "qwen3_moe")
# Rotary embeddings that are another function for longer texts: a trace keeps only one of them.
_ROPES_BY_LENGTH = ("dynamic", "longrope")
# Of a prompt, so many tokens at a time; their experts' weights are gathered, a copy for each slot of each token.
PROMPT_CHUNK = 16


class DecoderGraph(nn.Module):
    """Tensors in, tensors out, with or without the cache.

    Args:
        model: A causal language model in fp32, in evaluation mode.
        has_cache: Whether the cache is among inputs and outputs.
    """

    def __init__(self, model: PreTrainedModel, *, has_cache: bool) -> None:
        super().__init__()
        self.model = model
        self.has_cache = has_cache
        self.experts = [layer.experts for layer in find_moe_layers(model) if layer.experts is not None]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]) -> Any:
        """Return logits and, with a cache, the weights of the experts and the cache with the new tokens in it.

        Args:
            input_ids: `[B, S]` int64.
            attention_mask: `[B, P + S]` int64, 0 at padding, which stands on the left.
            past: Per layer what `DynamicCache` holds, `[B, heads, P, width]` twice. Empty without a cache.

        Returns:
            Logits `[B, S, vocabulary]`; with a cache a tuple of these, `expert_weights` `[L, B, S, E]` (0 where an
            expert is not used), and per layer the two tensors of `past` with P + S tokens.
        """
        cache = DynamicCache(ddp_cache_data=past, config=self.model.config)
        with self._recorded() as weights:
            output = self.model(
                input_ids=input_ids,
                attention_mask=causal_mask(attention_mask, input_ids.shape[1]),
                position_ids=positions_of(attention_mask)[:, -input_ids.shape[1] :],
                past_key_values=cache if self.has_cache else None,
                use_cache=self.has_cache,
            )
        if not self.has_cache:
            return output.logits
        expert_weights = torch.stack([one.view(*input_ids.shape, -1) for one in weights])
        return output.logits, expert_weights, [(layer.keys, layer.values) for layer in cache.layers]

    @contextmanager
    def _recorded(self) -> Iterator[list[Tensor]]:
        """The weights `[B * S, E]` of each layer's experts, from what the experts are called with."""
        found: list[Tensor] = []

        def record(experts: nn.Module, arguments: tuple[Any, ...]) -> None:
            _, topk_indices, topk_weights = arguments
            # Summed, not scattered: one row per token is small, and every runtime has these operators.
            is_expert = topk_indices.unsqueeze(-1) == torch.arange(experts.num_experts)
            found.append((is_expert * topk_weights.float().unsqueeze(-1)).sum(1))

        handles = [experts.register_forward_pre_hook(record) for experts in self.experts]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def positions_of(attention_mask: Tensor) -> Tensor:
    """Return positions `[B, P + S]`, counted from the first token that is not padding.

    Args:
        attention_mask: `[B, P + S]`.
    """
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def causal_mask(attention_mask: Tensor, num_new: int) -> Tensor:
    """Return what is added to attention scores, `[B, 1, S, P + S]` fp32: 0, or fp32's least number.

    Args:
        attention_mask: `[B, P + S]`, 0 at padding.
        num_new: S.
    """
    total = attention_mask.shape[1]
    keys = torch.arange(total)
    queries = keys[total - num_new :]
    is_seen = (keys[None, :] <= queries[:, None])[None, None] & (attention_mask[:, None, None, :] != 0)
    return torch.where(is_seen, 0.0, torch.finfo(torch.float32).min)


def check_exportable(model: PreTrainedModel, most_gathered_gib: float) -> None:
    """Refuse by name what the graph would not compute as transformers does.

    Args:
        model: The model.
        most_gathered_gib: The most memory that the gathered weights of a prompt's chunk may take, in GiB.

    Raises:
        ValueError: Such a model.
    """
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"model_type: got {config.model_type!r}, expected one of {', '.join(MODEL_TYPES)}")
    if has_four_bits(model):
        raise ValueError("model: got experts in 4 bits, expected ordinary weights; export first, then quantize")
    layer_types = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if getattr(config, "sliding_window", None) or layer_types:
        raise ValueError(
            f"model: got attention within a window ({', '.join(sorted(layer_types)) or config.sliding_window}), "
            "expected attention to the whole text"
        )
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in _ROPES_BY_LENGTH:
        raise ValueError(f"rope_parameters: got rope_type={rope!r}, whose frequencies depend on the text's length")
    gathered = PROMPT_CHUNK * gathered_bytes_per_token(model) / 2**30
    if gathered > most_gathered_gib:
        raise ValueError(
            f"model: {PROMPT_CHUNK} tokens gather {gathered:.2g} GiB of experts' weights, expected at most "
            f"{most_gathered_gib:g} GiB; pass --gather-gib {gathered * 1.05:.2g} if the device has the memory"
        )


def gathered_bytes_per_token(model: PreTrainedModel) -> int:
    """Return how many bytes of fp32 weights one layer gathers for one token: those of each expert it may use.

    Args:
        model: The model.
    """
    sizes = [
        sum(weight[0].numel() for weight in layer.experts.parameters()) * experts_per_token(model.config)
        for layer in find_moe_layers(model)
        if layer.experts is not None
    ]
    return 4 * max(sizes, default=0)


def experts_per_token(config: PreTrainedConfig) -> int:
    """Return K, the most experts that a token uses.

    Args:
        config: Of one of `MODEL_TYPES`.
    """
    return int(config.num_experts_per_tok)
