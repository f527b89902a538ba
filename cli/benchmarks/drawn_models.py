"""Models of transformers' own classes with drawn weights, made on the device where they run.

``whole_model_on_gpu.py`` measures them. Experts in 4 bits are drawn as codes and scales: no dense copy exists, of one
layer neither.
"""

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from deepseek_cli.benchmarks.finetune_count import EXPERTS, RANK
from deepseek_records.activation_checkpointing import enable_checkpointing
from modeling_deepseek.four_bit_experts import begin_four_bits, end_four_bits, find_format, packable_experts

_STD = 0.02
_TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "moe_intermediate_size": 32,
}
_TINY_LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "qk_head_dim": 24,
}


def tiny(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a small model of the same kind, of two layers.

    Args:
        config: Of a released model.
    """
    is_latent = "kv_lora_rank" in vars(config)
    own = {"n_routed_experts": 4, **_TINY_LATENT} if is_latent else {"num_experts": 4, "head_dim": 32}
    return changed(config, num_hidden_layers=2, num_key_value_heads=2, num_experts_per_tok=2, **_TINY, **own)


def changed(config: PreTrainedConfig, **settings: Any) -> PreTrainedConfig:
    """Return the same class with other settings, through its constructor, so that what it derives follows.

    Args:
        config: Of a model.
        settings: The others.
    """
    kept = {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}
    return type(config)(**{**kept, **settings})


def build(config: PreTrainedConfig, kind: str, device: str) -> nn.Module:
    """Return a model of drawn weights in bf16, experts by ``fused_moe``, never whole in memory in more than its kind.

    Args:
        config: Of the model.
        kind: ``4-bit`` or ``bf16``.
        device: ``cuda`` or ``cpu``.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.bfloat16, experts_implementation="fused_moe"
        )
    if kind == "4-bit":
        fmt = find_format(4, "nf4", None)
        for experts in packable_experts(model, fmt):
            begin_four_bits(experts, fmt)
            end_four_bits(experts)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if kind == "4-bit" and name.endswith(EXPERTS):
            continue  # shows a shape, and is one number
        _draw(name, parameter.data, generator)
    for name, buffer in model.named_buffers():
        _draw(name, buffer, generator)
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):  # computed, not loaded
            model.set_submodule(name, type(module)(model.config).to(device))
    return model.eval()


def _draw(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Weights of a usual size; codes of any kind with scales that give the same."""
    if name.endswith("_codes"):
        tensor.random_(0, 256, generator=generator)
    elif name.endswith("_scales"):
        tensor.fill_(_STD / 0.56)  # of the codes' values, drawn evenly, 0.56 is the root of the mean square
    elif tensor.dim() == 1 and tensor.is_floating_point():
        tensor.fill_(1.0 if "norm" in name else 0.0)
    else:
        tensor.normal_(std=_STD, generator=generator)


def adapted(model: nn.Module) -> nn.Module:
    """Return the model under the adapter of the page, its layers made again in the backward pass.

    Args:
        model: From `build`.
    """
    enable_checkpointing(model, {"use_reentrant": False})
    config = LoraConfig(
        r=RANK, lora_alpha=16, target_modules=["o_proj"], target_parameters=list(EXPERTS), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config).train()


def set_implementation(model: nn.Module, name: str) -> None:
    """Have the experts of a model run by another implementation.

    Args:
        model: From `build` or `adapted`.
        name: Of the implementation.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.set_experts_implementation(name)
