"""Which settings lie outside what a stock DeepSeek-V3 computes.

The export to ``deepseek_v3`` refuses them, and the model card promises that export only where there are none.
"""

from .configuration_deepseek import DeepseekConfig


def obstacles_to_deepseek_v3(config: DeepseekConfig) -> list[str]:
    """Return the settings outside DeepSeek-V3's range, each as ``name=value``.

    Args:
        config: The configuration.
    """
    obstacles = {
        "scoring_func": config.scoring_func != "sigmoid",
        "topk_method": config.topk_method == "group_limited_greedy",
        "min_experts_per_tok": config.has_dynamic_experts,
        "router_key_dim": config.router_key_dim is not None,
        "norm_type": config.norm_type != "rmsnorm",
    }
    return [f"{name}={getattr(config, name)!r}" for name, stands in obstacles.items() if stands]
