"""Pages for the latents of MLA in transformers' continuous batching, which has pages for keys and values only.

Without it a DeepSeek-V2 or V3 fails at the first token: the pages are sized by `head_dim` and hold expanded keys. A
page here holds what `DynamicCache` holds for these models: the normalized latent and the rotated shared key,
kv_lora_rank + qk_rope_head_dim numbers per token and layer. `engine.py` calls `use_latent_pages`.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching import cache as paged_cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import CachePool, FullAttentionCacheAllocator


class LatentCacheAllocator(FullAttentionCacheAllocator):
    """Keeps one row per token: latent and rotated key side by side.

    Blocks, tables and indices are the parent's; only what a row holds differs.

    Args:
        index: As for the parent, like what follows.
        config: With `kv_lora_rank` and `qk_rope_head_dim`.
        num_key_value_heads: Not used: the latent is shared by all heads.
        cache_dtype: Likewise.
        page_size: Likewise.
        layer_indices: Likewise.
        allow_block_sharing: Likewise.
    """

    rows_per_token = 1
    supports_block_table = False

    def __init__(
        self,
        index: int,
        config: PreTrainedConfig,
        num_key_value_heads: int,
        cache_dtype: torch.dtype,
        page_size: int,
        layer_indices: list[int],
        allow_block_sharing: bool,
    ) -> None:
        self.widths = [config.kv_lora_rank, config.qk_rope_head_dim]
        self.cache_dtype = cache_dtype
        self._before_cache_tensor_init(
            index=index,
            layer_indices=layer_indices,
            tokens_per_page=page_size,
            bytes_per_page=sum(self.widths) * cache_dtype.itemsize * page_size,
            allow_block_sharing=allow_block_sharing,
        )

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: torch.Tensor, pool: CachePool
    ) -> None:
        """View the bytes as rows, and for each layer from where its first page begins.

        Args:
            bytes_per_sector: As for the parent, like what follows.
            non_trash_bytes: Likewise.
            cache_tensor: `[bytes]` uint8.
            pool: Likewise.
        """
        self.bytes_per_sector = bytes_per_sector
        self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
        rows = cache_tensor.view(self.cache_dtype).view(-1, sum(self.widths))
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, rows, pool)
        self._rows_of_layer = {
            layer: rows[place * self.tokens_per_page :] for place, layer in enumerate(self.layer_indices)
        }

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        read_index: torch.Tensor,
        write_index: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' latents and return those that the batch reads.

        Args:
            key_states: Latents `[T, 1, kv_lora_rank]`.
            value_states: Rotated keys `[T, 1, qk_rope_head_dim]`.
            layer_idx: The layer.
            read_index: `[T + past]` rows; empty where every request of the batch is at its whole prompt.
            write_index: `[T]` rows.

        Returns:
            Both parts, `[T, 1, ...]` or `[T + past, 1, ...]`.
        """
        rows = self._rows_of_layer[layer_idx]
        rows.index_copy_(0, write_index, torch.cat((key_states, value_states), dim=-1).squeeze(1))
        if read_index.numel() == 0:
            return key_states, value_states
        latents, keys = rows.index_select(0, read_index).unsqueeze(1).split(self.widths, dim=-1)
        return latents, keys


class _AllocatorByConfig(FullAttentionCacheAllocator):
    """Makes latent pages for a configuration with latents, and transformers' own for any other."""

    def __new__(cls, *, config: PreTrainedConfig, **options: Any) -> Any:
        kind = LatentCacheAllocator if _has_latents(config) else FullAttentionCacheAllocator
        return kind(config=config, **options)


class _PagesOfPass:
    """Stands where attention expects `past_key_values`, and writes to the pages of one forward pass."""

    def __init__(self, cache: PagedAttentionCache, indices: dict[str, Any]) -> None:
        self.cache = cache
        self.indices = indices

    def update(
        self, latents: torch.Tensor, keys: torch.Tensor, layer_idx: int, *_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.update(latents, keys, layer_idx, dict(self.indices))


def use_latent_pages(model: PreTrainedModel) -> bool:
    """Let continuous batching keep a model's latents in pages, where its attention is MLA.

    Other models of the process keep the pages that transformers gives them: the choice is made by the configuration.

    Args:
        model: Any model; of other attention nothing is changed.

    Returns:
        Whether the model's attention is MLA.

    Raises:
        ValueError: It is MLA of a kind that keeps more than latents, such as sparse attention with an indexer.
    """
    if not _has_latents(model.config.get_text_config()):
        return False
    attentions = [module for module in model.modules() if hasattr(module, "kv_a_layernorm")]
    if any(hasattr(module, "indexer") or not hasattr(module, "expand_kv") for module in attentions):
        raise ValueError(
            f"model: got {type(model).__name__}, whose attention keeps more than MLA's latents, expected one of "
            "DeepSeek-V2 or V3's kind; deepseek-moe generate runs it without a server"
        )
    paged_cache.ATTN_TYPE_TO_ALLOCATOR["full_attention"] = _AllocatorByConfig
    for module in attentions:
        if not hasattr(module, "_latent_pages"):
            module._latent_pages = module.register_forward_pre_hook(_take_pages, with_kwargs=True)
    return True


def _has_latents(config: PreTrainedConfig) -> bool:
    return getattr(config, "kv_lora_rank", None) is not None  # other families' configurations have no such field


def _take_pages(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hand the pages to `past_key_values`; left in the keywords, attention would write expanded keys to them."""
    if isinstance(kwargs.get("cache"), PagedAttentionCache):
        kwargs = dict(kwargs)
        kwargs["past_key_values"] = _PagesOfPass(kwargs.pop("cache"), kwargs)
    return args, kwargs
