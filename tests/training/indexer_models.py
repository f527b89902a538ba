"""Tiny models of the families whose attention has an indexer, with attention that is not the same everywhere."""

from functools import cache
from pathlib import Path

import torch
from tiny_families import build_tiny, find_experts_classes

from deepseek_training.indexer.indexer_scores import find_indexed_layers

# Sizes at which 24 tokens are more than an indexer keeps.
CHANGES = {
    "deepseek_v32": {"index_n_heads": 16},  # of two, both are often 0, and equal scores fall as the layout has it
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 4,
        "sliding_window": 4,
    },
    "glm5_next": {"index_kpool": 4, "index_topk": 8},
    "minimax_m3_vl": {
        "layer_types": ["minimax_m3_sparse"] * 4, "index_n_heads": 4, "index_block_size": 4, "index_topk_blocks": 2,
    },
}  # fmt: skip


@cache
def families_with_an_indexer():
    """Folder of transformers/models to module and experts class, read from the sources."""
    found = {}
    for module, name in find_experts_classes():
        source = Path(__import__(module, fromlist=["_"]).__file__).read_text(encoding="utf-8")
        if "self.indexer = " in source:
            found[module.split(".")[2]] = (module, name)
    return found


def build(family, *, attention=None, seed=0, **changes):
    module, name = families_with_an_indexer()[family]
    small = build_tiny(module, name)
    config = small.config
    for key, value in {**CHANGES.get(family, {}), **changes}.items():
        setattr(config, key, value)
    for key in vars(config).keys() & {"layer_types", "mlp_layer_types"} if changes else ():
        setattr(config, key, getattr(config, key)[: config.num_hidden_layers])
    config._attn_implementation = attention or config._attn_implementation
    config._experts_implementation = "eager"  # the others know no fp64
    torch.manual_seed(seed)
    model = type(small)(config)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 2 and "self_attn" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    for key, table in model.named_buffers():
        if key.endswith("tid2eid"):  # DeepSeek-V4's experts by token; as built, the same expert in every slot
            table.copy_(
                (torch.arange(len(table)).unsqueeze(1) + torch.arange(table.shape[1])) % config.n_routed_experts
            )
    return model.train()


def indexer_parameters(model):
    return {name: value for name, value in model.named_parameters() if ".indexer." in name}


def layers_of(model):
    return find_indexed_layers(model)
