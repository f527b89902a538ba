"""Checkpoints for others: a stock `deepseek_v3` one that plain transformers loads with equal logits.

`deepseek-moe export` calls it. Surprising: whatever DeepSeek-V3 cannot express is refused by name rather than
approximated; the balancing bias is kept, for V3 has it, while losses and update speeds are training settings and go.
"""

from pathlib import Path

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from .configuration_deepseek import DeepseekConfig
from .modeling_deepseek import DeepseekForCausalLM

# transformers 5 neither writes nor reads these two, DeepSeek's own config.json has them: without topk_method vLLM and
# SGLang make no balancing bias and stop at its tensor, without scoring_func vLLM takes softmax scores.
_ENGINE_SETTINGS = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


def obstacles_to_deepseek_v3(config: DeepseekConfig) -> list[str]:
    """Return the settings outside DeepSeek-V3's range, each as ``name=value``.

    Args:
        config: The configuration.
    """
    obstacles = {
        "scoring_func": config.scoring_func != "sigmoid",
        "min_experts_per_tok": config.has_dynamic_experts,
        "router_key_dim": config.router_key_dim is not None,
        "norm_type": config.norm_type != "rmsnorm",
    }
    return [f"{name}={getattr(config, name)!r}" for name, stands in obstacles.items() if stands]


def export_deepseek_v3(model: DeepseekForCausalLM, output: str | Path) -> None:
    """Write a model as a stock `deepseek_v3` checkpoint.

    Args:
        model: A causal language model of ours.
        output: The folder to write.

    Raises:
        ValueError: The model is of another type, or outside DeepSeek-V3's range.
        FileExistsError: The folder holds files.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output: {output} exists and is not an empty folder")
    config = model.config
    if config.model_type != DeepseekConfig.model_type:
        raise ValueError(f"model_type: {config.model_type!r} is not allowed, want {DeepseekConfig.model_type}")
    obstacles = obstacles_to_deepseek_v3(config)
    if obstacles:
        raise ValueError(f"model: {', '.join(obstacles)} cannot be expressed in deepseek_v3")
    added = DeepseekConfig.__annotations__.keys() | {"auto_map", "model_type", "architectures", "transformers_version"}
    settings = {key: value for key, value in config.to_dict().items() if key not in added} | _ENGINE_SETTINGS
    state = model.state_dict()
    if config.tie_word_embeddings:
        # vLLM's and SGLang's DeepSeek have a head of their own, and it would stay as it was born.
        settings["tie_word_embeddings"] = False
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    # Built on the meta device and given our tensors, so that the weights are in memory once.
    stock = DeepseekV3ForCausalLM.from_pretrained(
        None, config=DeepseekV3Config(**settings), state_dict=state, dtype=model.dtype
    )
    stock._weight_conversions = None  # Else it would be written with the fused names it was given.
    stock.generation_config = model.generation_config
    stock.save_pretrained(output)
