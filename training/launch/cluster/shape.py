"""The shapes of a model that a plan reads: parameters and FLOPs of each layer, by part.

Built on the meta device, so any causal language model of transformers of any size takes seconds and no memory.

Axes in the names below: D hidden width, E experts, K chosen experts, F expert width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_deepseek.families import find_moe_layers


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        attention: Parameters of the attention.
        dense: Parameters of the dense feed-forward network and the shared experts.
        routed: Parameters of all routed experts; 0 in a dense layer.
        rest: Parameters of norms and router.
        num_experts: E, 0 in a dense layer.
    """

    attention: int
    dense: int
    routed: int
    rest: int
    num_experts: int

    @property
    def total(self) -> int:
        """All parameters of the layer."""
        return self.attention + self.dense + self.routed + self.rest


@dataclass(frozen=True)
class ModelShape:
    """A whole model.

    Attributes:
        name: What it was made from.
        hidden: D.
        vocabulary: Rows of the embedding table.
        layers: From first to last.
        embedding: Parameters of the table.
        head: Parameters of the head that are not the table's.
        rest: Parameters of the last norm and what else lies beside the layers.
        experts_per_token: K, the mean where it is dynamic.
        expert_width: F, 0 without experts.
        num_heads: Attention heads.
        query_width: Width of one head's query and key.
        value_width: Width of one head's value.
        key_value_width: Width of all heads' keys and values as they are kept for the backward pass.
        latent_width: Width of latent attention's latents together; 0 for other attention.
    """

    name: str
    hidden: int
    vocabulary: int
    layers: tuple[LayerShape, ...]
    embedding: int
    head: int
    rest: int
    experts_per_token: float
    expert_width: int
    num_heads: int
    query_width: int
    value_width: int
    key_value_width: int
    latent_width: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self.rest + sum(layer.total for layer in self.layers)

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return sum(layer.num_experts > 0 for layer in self.layers)

    @property
    def num_experts(self) -> int:
        """E; 0 for a dense model."""
        return max((layer.num_experts for layer in self.layers), default=0)

    def active_of(self, layer: LayerShape) -> float:
        """Return the parameters of a layer that one token uses in products."""
        share = self.experts_per_token / layer.num_experts if layer.num_experts else 0.0
        return layer.attention + layer.dense + layer.routed * share

    @property
    def active(self) -> float:
        """Parameters that one token uses, embedding table and head counted as DeepSeek's papers do."""
        return self.embedding + self.head + sum(self.active_of(layer) + layer.rest for layer in self.layers)

    def attention_flops(self, length: int) -> float:
        """Return the FLOPs of one token's scores and weighted sum in one layer, at half of `length` on average."""
        return 2 * self.num_heads * (self.query_width + self.value_width) * length / 2

    def flops_per_token(self, length: int) -> float:
        """Return the FLOPs of one token's forward and backward pass, three times the forward's.

        `3 * (2 * active products + attention)`, the head counted once, the table not at all.
        """
        products = sum(self.active_of(layer) for layer in self.layers) + self.vocabulary * self.hidden
        return 3 * (2 * products + len(self.layers) * self.attention_flops(length))


def read_shape(config: Any, name: str, experts_per_token: float | None = None) -> ModelShape:
    """Return the shapes of the causal language model that a configuration describes.

    Args:
        config: Of any causal language model that transformers builds.
        name: For what is printed.
        experts_per_token: K to plan for; None: the target mean where the model has one, else the most.

    Raises:
        ValueError: More experts per token than there are, or layers that are not found.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config = model.config.get_text_config()
    moe = {layer.name: layer for layer in find_moe_layers(model)}
    layers = tuple(_shape_of(block, prefix, moe) for prefix, block in _decoder_layers(model))
    chosen = _chosen_experts(config, experts_per_token) if moe else 0.0
    if moe and not 0 < chosen <= max(layer.num_experts for layer in layers):
        raise ValueError(f"--experts-per-token: got {chosen:g}, expected at most the model's experts")
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    queries, values, kept, latent = _head_widths(config)
    head_size = 0 if head is table else head.numel()
    beside = table.numel() + head_size + sum(layer.total for layer in layers)
    return ModelShape(
        name=name,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        layers=layers,
        embedding=table.numel(),
        head=head_size,
        rest=sum(parameter.numel() for parameter in model.parameters()) - beside,
        experts_per_token=chosen,
        expert_width=_expert_width(config) if moe else 0,
        num_heads=config.num_attention_heads,
        query_width=queries,
        value_width=values,
        key_value_width=kept,
        latent_width=latent,
    )


def _decoder_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) >= count and name.rsplit(".", 1)[-1] == "layers":
            for place, block in enumerate(list(module)[:count]):
                yield f"{name}.{place}", block
            return
    raise ValueError(f"model: got {type(model).__name__}, expected one with a list of decoder layers")


def _shape_of(block: nn.Module, prefix: str, moe: dict[str, Any]) -> LayerShape:
    found = next((layer for name, layer in moe.items() if name.startswith(prefix + ".")), None)
    experts = {id(p) for p in found.experts.parameters()} if found is not None and found.experts is not None else set()
    parts = dict.fromkeys(("attention", "dense", "routed", "rest"), 0)
    router = {id(p) for p in found.router.parameters()} if found is not None else set()
    for name, parameter in block.named_parameters():
        if id(parameter) in experts:
            part = "routed"
        elif id(parameter) in router or "norm" in name or parameter.ndim < 2:
            part = "rest"
        else:
            part = "attention" if "attn" in name or "attention" in name else "dense"
        parts[part] += parameter.numel()
    return LayerShape(**parts, num_experts=(found.num_experts or 0) if found is not None else 0)


def _chosen_experts(config: Any, asked: float | None) -> float:
    if asked is not None:
        return asked
    target = getattr(config, "target_experts_per_tok", None)
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k"):
        most = getattr(config, name, None)
        if isinstance(most, int):
            return float(target) if target else float(most)
    raise ValueError("--experts-per-token: got nothing, expected a number (the model's configuration does not say it)")


def _expert_width(config: Any) -> int:
    for name in ("moe_intermediate_size", "intermediate_size"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return 0


def _head_widths(config: Any) -> tuple[int, int, int, int]:
    """Width of a head's query and value, of all keys and values kept for the backward pass, and of the latents."""
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        query = config.qk_nope_head_dim + config.qk_rope_head_dim
        latent = config.kv_lora_rank + config.qk_rope_head_dim + (config.q_lora_rank or heads * query)
        return query, config.v_head_dim, heads * (query + config.v_head_dim), latent
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return width, width, 2 * width * (getattr(config, "num_key_value_heads", None) or heads), 0
