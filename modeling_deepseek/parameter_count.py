"""How many parameters a configuration has, by part, how many of them a token uses, and what that costs.

`deepseek-moe params` prints it. The model is built on the meta device, so a 154 B one takes seconds and no memory.
Parameters active per token count the embedding table and the head, as DeepSeek's papers do, while FLOPs
leave the table out, for looking up a row is not a product. Multi-token prediction layers count where the model has
them, which is while it trains with `mtp_loss_coef`; each of them uses the head once more.
"""

from dataclasses import dataclass

import torch

from .configuration_deepseek import DeepseekConfig
from .modeling_deepseek import DeepseekForCausalLM

# In order: the first fragment found in a parameter's name decides.
_PART_OF_FRAGMENT = (
    ("embed_tokens", "embedding"),
    ("lm_head", "head"),
    ("norm", "norms"),
    ("self_attn", "attention"),
    ("mlp.experts", "routed experts"),
    ("mlp.shared_experts", "shared experts"),
    ("mlp.gate.", "router"),
    ("eh_proj", "prediction"),
    ("mlp", "dense feed-forward"),
)
PARTS = tuple(dict.fromkeys(part for _, part in _PART_OF_FRAGMENT))


@dataclass(frozen=True)
class ParameterCount:
    """What `count_parameters` found.

    Attributes:
        parts: Parameters by part.
        active_parts: The same, of which one token uses.
        attention_flops_per_position: Multiply-adds twice over, per token and per earlier position attended to.
        has_tied_head: The head is the embedding table.
        num_head_uses: 1, and 1 more for each multi-token prediction layer.
        mean_experts_per_tok: Routed experts per token that the active counts assume.
    """

    parts: dict[str, int]
    active_parts: dict[str, float]
    attention_flops_per_position: int
    has_tied_head: bool
    num_head_uses: int
    mean_experts_per_tok: float

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    @property
    def active(self) -> float:
        """Parameters that one token uses."""
        return sum(self.active_parts.values())

    def flops_per_token(self, context_length: int, *, is_dense: bool = False) -> float:
        """Return the FLOPs of one token's forward pass; a training step costs three times as much.

        `2 * (parameters used in products) + attention_flops_per_position * context_length / 2`: a causal token sees
        half the context on average.

        Args:
            context_length: Tokens in the context.
            is_dense: Count the dense equivalent, which runs every expert for every token.
        """
        parts = self.parts if is_dense else self.active_parts
        products = sum(count for part, count in parts.items() if part not in ("embedding", "norms", "head"))
        products += self.num_head_uses * parts["embedding" if self.has_tied_head else "head"]
        return 2 * products + self.attention_flops_per_position * context_length / 2


def count_parameters(config: DeepseekConfig, mean_experts_per_tok: float | None = None) -> ParameterCount:
    """Count a configuration's parameters by part.

    Args:
        config: The configuration.
        mean_experts_per_tok: Routed experts per token to assume; None: `num_experts_per_tok`, the most there can be.

    Returns:
        The counts.

    Example:
        >>> count_parameters(DeepseekConfig.from_preset("154b")).total
        154099136512
    """
    mean = config.num_experts_per_tok if mean_experts_per_tok is None else mean_experts_per_tok
    with torch.device("meta"):
        model = DeepseekForCausalLM(config)
    parts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        parts[next(part for fragment, part in _PART_OF_FRAGMENT if fragment in name)] += parameter.numel()
    if not config.num_mtp_modules:
        del parts["prediction"]
    active = {part: float(count) for part, count in parts.items()}
    active["routed experts"] *= mean / config.n_routed_experts
    num_layers = config.num_hidden_layers + config.num_mtp_modules
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return ParameterCount(
        parts=parts,
        active_parts=active,
        attention_flops_per_position=2 * num_layers * config.num_attention_heads * widths,
        has_tied_head=config.tie_word_embeddings,
        num_head_uses=1 + config.num_mtp_modules,
        mean_experts_per_tok=mean,
    )
