"""Checkpoints for others: stock `deepseek_v3` and `deepseek_v2` ones that plain transformers loads.

`deepseek-moe export` calls it. Whatever the other side cannot express is refused by name rather than
approximated. The balancing bias is kept for V3 and must be zero for V2, which has none; losses and update speeds are
training settings and go; multi-token prediction layers go along to V3.
"""

from pathlib import Path

import torch
from transformers import DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from deepseek_records.output_paths import check_output, make_output
from modeling_deepseek.carried_mtp import mtp_part, with_carried
from modeling_deepseek.configuration_deepseek import DeepseekConfig
from modeling_deepseek.conversion import split_expert_names
from modeling_deepseek.deepseek_v2 import obstacles_to_deepseek_v2, v2_config_of
from modeling_deepseek.deepseek_v3_range import obstacles_to_deepseek_v3
from modeling_deepseek.four_bit_experts import has_four_bits
from modeling_deepseek.modeling_deepseek import DeepseekForCausalLM

# transformers 5 neither writes nor reads these two, DeepSeek's own config.json has them: without topk_method vLLM and
# SGLang make no balancing bias and stop at its tensor, without scoring_func vLLM takes softmax scores.
_ENGINE_SETTINGS = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_BIAS = "e_score_correction_bias"


def export_deepseek_v3(model: DeepseekForCausalLM, output: str | Path) -> None:
    """Write a model as a stock `deepseek_v3` checkpoint.

    Args:
        model: A causal language model of ours.
        output: The folder to write.

    Raises:
        ValueError: The model is of another type, or outside DeepSeek-V3's range.
        FileExistsError: The folder holds files.
    """
    output = _checked(model, output)
    config = model.config
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
        None, config=DeepseekV3Config(**settings), state_dict=_without_mtp(state, config), dtype=model.dtype
    )
    carried = {name.removeprefix("model."): value for name, value in _official_mtp(model).items()}
    _save(stock, model, output, with_carried(stock.state_dict(), carried, "model.", model.dtype))


def export_deepseek_v2(model: DeepseekForCausalLM, output: str | Path) -> None:
    """Write a model as a stock `deepseek_v2` checkpoint.

    Args:
        model: A causal language model of ours.
        output: The folder to write.

    Raises:
        ValueError: The model is of another type, or outside DeepSeek-V2's range.
        FileExistsError: The folder holds files.
    """
    output = _checked(model, output)
    state = _without_mtp(model.state_dict(), model.config)
    obstacles = obstacles_to_deepseek_v2(model.config)
    if any(state[name].any() for name in state if name.endswith(_BIAS)):
        obstacles.append(f"{_BIAS} other than 0")
    if _official_mtp(model):
        obstacles.append("multi-token prediction layers")
    if obstacles:
        raise ValueError(f"model: {', '.join(obstacles)} cannot be expressed in deepseek_v2")
    state = {name: value for name, value in state.items() if not name.endswith(_BIAS)}
    stock = DeepseekV2ForCausalLM.from_pretrained(
        None, config=v2_config_of(model.config), state_dict=state, dtype=model.dtype
    )
    _save(stock, model, output, stock.state_dict())


def _checked(model: PreTrainedModel, output: str | Path) -> Path:
    output = check_output(output)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"output: got {output}, expected an empty or absent folder")
    if model.config.model_type != DeepseekConfig.model_type:
        raise ValueError(
            f"model_type: got {model.config.model_type!r}, expected {DeepseekConfig.model_type}; transformers loads "
            f"{model.config.model_type} as it is, so there is nothing to export"
        )
    if has_four_bits(model):
        raise ValueError("model: got experts in 4 bits, expected ordinary weights; export first, then quantize")
    return output


def _without_mtp(state: dict[str, torch.Tensor], config: DeepseekConfig) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if mtp_part(name, config) is None}


def _official_mtp(model: DeepseekForCausalLM) -> dict[str, torch.Tensor]:
    """The multi-token prediction weights, trained or carried, with per-expert names."""
    state = {name: value for name, value in model.state_dict().items() if mtp_part(name, model.config) is not None}
    return {**model._carried_mtp, **split_expert_names(state)}


def _save(stock: PreTrainedModel, model: DeepseekForCausalLM, output: Path, state: dict[str, torch.Tensor]) -> None:
    stock._weight_conversions = None  # Else it would be written with the fused names it was given.
    stock.generation_config = model.generation_config
    stock.save_pretrained(make_output(output), state_dict=state)
