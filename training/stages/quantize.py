"""Put a model's routed experts into 4 bits by AWQ, without training it.

``deepseek-moe quantize`` calls `quantize`. The result is a run folder whose ``model/`` every other command takes, with
what it cost on held-out text; what else a model holds (attention, router, shared and dense layers, embedding, head)
stays as it is.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from deepseek_records.loading import load_tokenizer
from deepseek_records.summary import Summary
from deepseek_training.compress.awq import AwqSettings, awq
from deepseek_training.compress.calibration import calibration_blocks, shuffled_blocks
from deepseek_training.compress.divergence import Reference
from deepseek_training.compress.outcome import quantize_outcome
from deepseek_training.compress.remaking import open_remaking
from deepseek_training.compress.student import read_config
from deepseek_training.compress.student_config import outline
from deepseek_training.data.corpus import Corpus
from deepseek_training.data.packing import encode_documents
from deepseek_training.recipes.quantize import QuantizeSettings
from deepseek_training.trainer.new_model import check_context
from modeling_deepseek.families import find_moe_layers
from modeling_deepseek.four_bit_experts import PROJECTIONS, FourBitWeights, find_format, packable_experts
from modeling_deepseek.packed_checkpoint import check_packable_names, save_packed

__all__ = ["QuantizeSettings", "check_model", "quantize"]


def quantize(
    settings: QuantizeSettings, output: str | Path, *, overwrite: bool = False, is_dry: bool = False
) -> Summary | None:
    """Quantize a model and return the summary.

    Args:
        settings: How, and by what text.
        output: The run folder.
        overwrite: Delete whatever run the folder holds.
        is_dry: Print what would be quantized, write nothing, and return None.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: The model or a data set is missing.
        ValueError: The experts cannot be stored so, are quantized already, or the text is too short.
    """
    started = time.monotonic()
    config = read_config(settings.model)
    shapes = check_model(config, settings)
    check_context(settings, config)
    tokenizer = load_tokenizer(settings.model)
    corpus = Corpus.load(settings.data, settings.data_column)
    blocks = shuffled_blocks(encode_documents(corpus.train, tokenizer), settings.sequence_length)
    calibration = calibration_blocks(blocks, settings.calibration_tokens, config)
    remaking = open_remaking(
        settings,
        output,
        command="quantize",
        told=_describe(shapes, settings),
        corpus=corpus,
        tokenizer=tokenizer,
        started=started,
        overwrite=overwrite,
        is_dry=is_dry,
    )
    if remaking is None:
        return None
    model, held_out = remaking.model, remaking.held_out
    reference = Reference.of(model, held_out, settings)
    reports = awq(model, calibration, _awq_settings(settings))
    comparison = reference.compare(model)
    save_packed(model, remaking.run.model_path)
    outcome = quantize_outcome(settings, held_out.name, comparison, reports)
    outcome["details"]["quantized"] = _describe(model, settings)
    outcome["details"]["expert_bytes_per_weight"] = bytes_per_weight(model)
    return remaking.finish(model.num_parameters(), **outcome)


def bytes_per_weight(model: torch.nn.Module) -> float:
    """Return the bytes that one weight of the 4-bit experts takes, scales included.

    Args:
        model: With 4-bit experts.
    """
    found = [module for module in model.modules() if isinstance(module, FourBitWeights)]
    num_bytes = sum(buffer.nbytes for weights in found for buffer in weights.buffers())
    return num_bytes / sum(torch.Size(shape).numel() for weights in found for shape in weights.shapes.values())


def _awq_settings(settings: QuantizeSettings) -> AwqSettings:
    return AwqSettings(
        group_size=settings.group_size,
        grid=settings.grid,
        is_clipped=settings.clip,
        is_fed_back=settings.feedback,
        is_power_of_two=settings.scales == "power_of_two",
        batch_size=settings.batch_size,
    )


def check_model(config: PreTrainedConfig, settings: QuantizeSettings) -> PreTrainedModel:
    """Refuse, before a weight is read, what cannot be stored; returns the model without weights.

    Args:
        config: The model's.
        settings: How it is to be quantized.

    Raises:
        ValueError: The experts cannot be stored so, or are quantized already.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        raise ValueError(f"model: got {settings.model}, quantized already ({method}), expected ordinary weights")
    shapes = outline(config)
    _check_group(shapes, settings.group_size)
    packable_experts(shapes, find_format(settings.bits, "int4", settings.group_size))
    check_packable_names(shapes)
    return shapes


def _check_group(model: PreTrainedModel, group_size: int) -> None:
    """Refuse a group that does not divide what each expert's matrices take in, and name one that does."""
    experts = [layer.experts for layer in find_moe_layers(model) if layer.experts is not None]
    stacks = [
        one._parameters[name] for one in experts for name in PROJECTIONS if one._parameters.get(name) is not None
    ]
    widths = sorted({stack.shape[2] for stack in stacks})
    if all(width % group_size == 0 for width in widths):
        return
    common = math.gcd(*widths)
    fits = next((size for size in range(group_size // 8 * 8, 7, -8) if common % size == 0), None)
    hint = f", such as {fits}" if fits else ", and there is none from 8 on"
    listed = " and ".join(map(str, widths))
    raise ValueError(f"group_size: got {group_size}, expected a divisor of the experts' {listed} inputs{hint}")


def _describe(model: PreTrainedModel, settings: QuantizeSettings) -> str:
    found = [module for module in model.modules() if {"gate_up_proj", "down_proj"} <= set(module._parameters)]
    experts = sum(module.get_parameter(name).numel() for module in found for name in ("gate_up_proj", "down_proj"))
    share = experts / model.num_parameters()
    return (
        f"routed experts of {len(found)} layers in {settings.bits} bits, groups of {settings.group_size}: "
        f"{experts:,} of {model.num_parameters():,} weights, {share:.1%}"
    )
