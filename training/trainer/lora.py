"""LoRA in the stages: an adapter on attention and routed experts, by PEFT; the weights themselves stay as they are.

`adapt` and `sft` call it where a recipe sets `lora_rank`. The adapter is saved by itself and merged into the weights,
so that every later command takes the result like any other model.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from deepseek_training.recipes.grpo import GrpoRecipe
from deepseek_training.recipes.pretrain_and_adapt import LoraSettings
from deepseek_training.trainer.split_checkpoint import stored_state
from modeling_deepseek.families import find_moe_layers

ADAPTER_FOLDER = "adapter"


def with_lora(model: PreTrainedModel, recipe: LoraSettings | GrpoRecipe) -> PreTrainedModel | PeftModel:
    """Return the model with a new adapter, or as it is where the recipe asks for none.

    Where the balancing bias or the expert share moves, the routers are saved with the adapter: they hold that state.

    Args:
        model: Any causal language model; its weights are frozen.
        recipe: Rank, weight and targets.

    Raises:
        ValueError: No layer of the model is called as `lora_targets` says.
    """
    if not recipe.lora_rank:
        return model
    modules, parameters = adapted_names(model) if recipe.lora_targets is None else _sort(model, recipe.lora_targets)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha or 2 * recipe.lora_rank,
        lora_dropout=0.0,
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=_moving_routers(model, recipe) or None,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(recipe.seed)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"lora_targets: got {recipe.lora_targets} ({' '.join(str(error).split())})") from None
    if Path(recipe.model).exists():  # or a later command in another folder would not find it
        adapted.peft_config["default"].base_model_name_or_path = str(Path(recipe.model).resolve())
    return adapted


def adapted_names(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Return the linear layers of attention and the experts' 3-D parameters; of a dense model every linear layer.

    Args:
        model: Any causal language model.
    """
    layers = find_moe_layers(model)
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    linear = [name for name in linear if model.get_submodule(name) is not head]
    if not layers:
        return sorted({name.rpartition(".")[2] for name in linear}), []
    blocks = {layer.name.rpartition(".")[2] for layer in layers}
    kept = {name.rpartition(".")[2] for name in linear if not blocks & set(name.split("."))}
    experts = [layer.experts for layer in layers if layer.experts is not None]
    names = {name for one in experts for name, value in one.named_parameters(recurse=False) if value.dim() == 3}
    # Experts loaded in FP8 have a scale for each block, in three dimensions as well.
    return sorted(kept), sorted(f"experts.{name}" for name in names if not name.endswith("_scale_inv"))


def _sort(model: PreTrainedModel, names: list[str]) -> tuple[list[str], list[str]]:
    """The user's targets: names of modules, and of the experts' parameters."""
    parameters = [name for name in names if any(key.endswith(f".{name}") for key, _ in model.named_parameters())]
    return [name for name in names if name not in parameters], parameters


def _moving_routers(model: PreTrainedModel, recipe: LoraSettings | GrpoRecipe) -> list[str]:
    config = model.config.get_text_config()
    speed = recipe.bias_update_speed
    if speed is None:
        speed = getattr(config, "router_bias_update_speed", 0.0)
    is_moving = bool(speed) or getattr(config, "mean_experts_target", None) is not None
    return sorted({layer.router_name for layer in find_moe_layers(model)} - {""}) if is_moving else []


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the model with its adapter added to its weights: a copy, or the model itself if it has no adapter.

    Args:
        model: Left as it is, for others may share its weights.
    """
    return copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model


def save_gathered_adapter(model: PeftModel, folder: Path) -> None:
    """Save an adapter of which each process holds a part; all call it.

    Args:
        model: Split by FSDP2.
        folder: The adapter's.
    """
    parts = stored_state(model)
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in parts.items()}
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict={name: value.cpu() for name, value in whole.items()})


def save_adapted(model: Any, folder: Path, model_path: Path) -> None:
    """Save an adapter by itself and merged; a model without one as it is.

    Args:
        model: A trained one.
        folder: The run folder.
        model_path: Where the whole model goes.
    """
    if isinstance(model, PeftModel):
        model.save_pretrained(folder / ADAPTER_FOLDER)
    merged(model).save_pretrained(model_path)
