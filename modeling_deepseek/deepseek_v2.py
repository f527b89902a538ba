"""DeepSeek-V2's settings in our words, and back: softmax routing, the best groups by their best expert, no bias.

`DeepseekConfig` reads a `deepseek_v2` checkpoint's ``config.json`` through it, `export_deepseek_v2` writes one.
Surprising: where transformers' `DeepseekV2ForCausalLM` and DeepSeek's own code part ways, DeepSeek's is followed.
transformers ignores `norm_topk_prob`, and stops at the spelling ``"gready"`` of DeepSeek's first configurations.
"""

from typing import Any

from transformers import DeepseekV2Config

_TOPK_METHODS = {"greedy": "greedy", "gready": "greedy", "group_limited_greedy": "group_limited_greedy"}
# Of V2's training or of its remote code; nothing here reads them.
_DROPPED = ("auto_map", "model_type", "architectures", "transformers_version", "mlp_bias", "moe_layer_freq", "ep_size")


def settings_from_v2(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Return our settings for a DeepSeek-V2 model, of which absent ones have V2's defaults.

    With `norm_topk_prob`, V2 normalizes the weights and leaves `routed_scaling_factor` out.

    Args:
        config_dict: The contents of its ``config.json``.

    Raises:
        ValueError: A setting outside what this model computes; the message names it, its value and what is allowed.
    """
    asked = {
        "topk_method": (config_dict.get("topk_method", "greedy"), tuple(_TOPK_METHODS)),
        "scoring_func": (config_dict.get("scoring_func", "softmax"), ("softmax",)),
        "moe_layer_freq": (config_dict.get("moe_layer_freq", 1), (1,)),
        "mlp_bias": (config_dict.get("mlp_bias", False), (False,)),
    }
    for name, (value, allowed) in asked.items():
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}, expected {' or '.join(map(str, allowed))}")
    settings = DeepseekV2Config(**config_dict).to_dict()
    settings = {key: value for key, value in settings.items() if key not in _DROPPED}
    settings["scoring_func"] = "softmax"
    settings["topk_method"] = _TOPK_METHODS[settings["topk_method"]]
    if settings["topk_method"] == "greedy":
        settings["n_group"] = settings["topk_group"] = 1
    settings["norm_topk_prob"] = bool(settings["norm_topk_prob"]) and settings["num_experts_per_tok"] > 1
    if settings["norm_topk_prob"]:
        settings["routed_scaling_factor"] = 1.0
    settings["num_nextn_predict_layers"] = 0
    return settings


def obstacles_to_deepseek_v2(config: Any) -> list[str]:
    """Return the settings outside what transformers' DeepSeek-V2 computes, each as ``name=value``.

    Args:
        config: A `DeepseekConfig`.
    """
    obstacles = {
        "scoring_func": config.scoring_func != "softmax",
        "topk_method": config.topk_method == "noaux_tc" and config.n_group > 1,
        "norm_topk_prob": config.norm_topk_prob and config.num_experts_per_tok > 1,
        "min_experts_per_tok": config.has_dynamic_experts,
        "router_key_dim": config.router_key_dim is not None,
        "norm_type": config.norm_type != "rmsnorm",
        "rope_interleave": not config.rope_interleave,
    }
    return [f"{name}={getattr(config, name)!r}" for name, stands in obstacles.items() if stands]


def v2_config_of(config: Any) -> DeepseekV2Config:
    """Return the DeepSeek-V2 configuration of a model within its range.

    Args:
        config: A `DeepseekConfig` for which `obstacles_to_deepseek_v2` returns nothing.
    """
    ours = config.to_dict()
    settings = {name: ours[name] for name in DeepseekV2Config().to_dict() if name in ours and name not in _DROPPED}
    settings["topk_method"] = "greedy" if config.n_group == 1 else "group_limited_greedy"
    settings["norm_topk_prob"] = False
    return DeepseekV2Config(**settings)
