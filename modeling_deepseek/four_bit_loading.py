"""4-bit experts through `from_pretrained`: quantized while a checkpoint loads, or read as they were saved.

``from_pretrained(path, quantization_config=FourBitExpertsConfig(format="int4"))`` quantizes experts once they are
read, so that at most one projection of one layer exists in full. What `save_pretrained` then writes names this method
in its configuration, and loads again by the Auto classes wherever this file was imported.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .four_bit_experts import (
    METHOD,
    PROJECTIONS,
    FourBitWeights,
    find_format,
    packable_experts,
    placeholder,
    run_in_four_bits,
)
from .packed_checkpoint import LAYOUT, packed_converters


class FourBitExpertsConfig(QuantizationConfigMixin):
    """Which 4 bits the routed experts take; nothing else is quantized.

    Args:
        bits: 4.
        format: ``nf4`` or ``int4``.
        group_size: Weights per scale; None: 64 for nf4, 128 for int4.
        layout: None for stacks of experts as they are in memory; ``pack-quantized`` for experts one by one.
        kwargs: What `from_dict` passes of a saved configuration.
    """

    def __init__(
        self,
        bits: int = 4,
        format: str = "nf4",
        group_size: int | None = None,
        layout: str | None = None,
        **kwargs: Any,
    ) -> None:
        fmt = find_format(bits, format, group_size)
        self.quant_method = METHOD
        self.bits, self.format, self.group_size = bits, fmt.name, fmt.group_size
        self.layout = layout


class FourBitExpertsQuantizer(HfQuantizer):
    """Transformers' hooks around the loading of a checkpoint."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        fmt = find_format(config.bits, config.format, config.group_size)
        for experts in packable_experts(model, fmt):
            first = experts._parameters["down_proj"]
            shapes = {name: tuple(experts._parameters[name].shape) for name in PROJECTIONS}
            experts.four_bit = FourBitWeights(fmt, shapes, first.dtype, "meta")
            experts._is_hf_initialized = True  # or the model would give the placeholders first values
            if self.pre_quantized:
                for name in PROJECTIONS:
                    experts._parameters[name] = None  # or the loader would miss it and make a new one

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for experts in model.modules():
            weights = experts._modules.get("four_bit")
            if isinstance(weights, FourBitWeights):
                for name, shape in weights.shapes.items():
                    scales = weights.get_buffer(f"{PROJECTIONS[name]}_scales")
                    dtype = weights.dtype if self.pre_quantized else experts._parameters[name].dtype
                    experts._parameters[name] = placeholder(shape, dtype, scales.device)
                run_in_four_bits(experts)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Return the conversions by which experts that lie one by one become stacks of codes and scales.

        Args:
            weight_conversions: The model's own.
            model: That is loaded.
        """
        if self.quantization_config.layout != LAYOUT:
            return super().update_weight_conversions(weight_conversions, model)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, r"\.weight_shape$"}
        return packed_converters(weight_conversions)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Return whether this is a projection of experts that are put into 4 bits.

        Args:
            model: That is loaded.
            param_name: Of its state dict.
            kwargs: Unused.
        """
        path, _, name = param_name.rpartition(".")
        return name in PROJECTIONS and "four_bit" in model.get_submodule(path)._modules

    def get_quantize_ops(self) -> ConversionOps:
        """Return what turns a projection into codes and scales."""
        return QuantizeProjection()

    def is_serializable(self) -> bool:
        """Return True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters on the experts train."""
        return True


class QuantizeProjection(ConversionOps):
    """One projection of one layer as codes and scales, while a checkpoint loads."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Return the buffers by name.

        Args:
            input_dict: The projection, [E, M, N], by name.
            model: That is loaded.
            kwargs: Unused.
        """
        assert model is not None  # transformers hands it over
        result = {}
        for full_name, value in input_dict.items():
            stack = value[0] if isinstance(value, list) else value
            path, _, name = full_name.rpartition(".")
            weights = model.get_submodule(path).four_bit
            filled = FourBitWeights(weights.format, {name: tuple(stack.shape)}, stack.dtype, stack.device)
            filled.fill(name, stack)
            for buffer_name, buffer in filled.named_buffers():
                result[f"{path}.four_bit.{buffer_name}"] = buffer
            result[full_name] = placeholder(tuple(stack.shape), stack.dtype, stack.device)
        return result


if METHOD not in AUTO_QUANTIZER_MAPPING:  # another copy of this file may have been imported before
    register_quantization_config(METHOD)(FourBitExpertsConfig)
    register_quantizer(METHOD)(FourBitExpertsQuantizer)
