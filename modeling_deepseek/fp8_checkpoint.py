"""DeepSeek's released FP8 weights, dequantized while they load.

A quantized `weight` in E4M3 comes with `weight_scale_inv`, one fp32 factor per block of 128 x 128; blocks at the edge
are smaller. `DeepseekConfig` sends such a checkpoint here by renaming its quantization method. Surprising:
transformers' own dequantization takes the block's size to be the weight's divided by the scales', so that it stops at
576 rows, and takes 192 rows for two blocks of 96.
"""

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

logger = logging.get_logger(__name__)

METHOD = "deepseek_fp8"


def adopt_fp8(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with a released FP8 checkpoint's `quantization_config` pointing here; others unchanged.

    Args:
        config_dict: The contents of a ``config.json``.

    Raises:
        ValueError: FP8 weights that are not in blocks.
    """
    quantization = config_dict.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return config_dict
    block = quantization.get("weight_block_size")
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ValueError(f"quantization_config: weight_block_size: got {block!r}, expected two whole numbers")
    return {**config_dict, "quantization_config": {"quant_method": METHOD, "weight_block_size": list(block)}}


def dequantize_blocks(
    weight: torch.Tensor, scale_inv: torch.Tensor, block_size: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Return `weight[i, j] * scale_inv[i // block_rows, j // block_columns]`, computed in fp32.

    Args:
        weight: `[M, N]` in FP8, or in a wider dtype with the same values.
        scale_inv: `[ceil(M / block_rows), ceil(N / block_columns)]`.
        block_size: Rows and columns of a block.
        dtype: Of the result.

    Raises:
        ValueError: The shapes do not belong together.

    Reference:
        DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2 (fine-grained quantization).
    """
    rows, columns = block_size
    wanted = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    if tuple(scale_inv.shape) != wanted:
        raise ValueError(
            f"weight_scale_inv: got {tuple(scale_inv.shape)}, expected {wanted} for {tuple(weight.shape)}"
        )
    output = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    # A row of blocks at a time: an fp32 copy of the whole weight would be four times its size.
    for block, factors in enumerate(scale_inv.float()):
        part = slice(block * rows, (block + 1) * rows)
        output[part] = weight[part].float() * factors.repeat_interleave(columns)[: weight.shape[1]]
    return output


class DequantizeBlocks(ConversionOps):
    """The step of a `WeightConverter` that joins weights with their scales, before experts are stacked.

    Args:
        hf_quantizer: The quantizer; that it is there has transformers hand over the tensors as stored.
    """

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, list[torch.Tensor]], *, full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        """Return the weights alone, in the model's dtype.

        Args:
            input_dict: Tensors by source pattern; the scales' patterns are the weights' with another ending.
            full_layer_name: The model's tensor that they are for.
            model: The model.
            **kwargs: Unused.
        """
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        block_size = tuple(self.hf_quantizer.quantization_config.weight_block_size)
        weights = {}
        for pattern, tensors in input_dict.items():
            if pattern.endswith("_scale_inv$"):
                continue
            # The general converter has the name of its one tensor for a result, the experts' their patterns.
            name = full_layer_name if pattern == "weight$" else pattern
            scales = input_dict.get(pattern.removesuffix("$") + "_scale_inv$")
            if scales is None:
                weights[name] = [tensor.to(dtype) for tensor in tensors]
            else:
                weights[name] = [
                    dequantize_blocks(tensor, scale, block_size, dtype)
                    for tensor, scale in zip(tensors, scales, strict=True)
                ]
        return weights


class BlockFp8Config(QuantizationConfigMixin):
    """Holds the size of the blocks.

    Args:
        weight_block_size: Rows and columns.
        **kwargs: Unused.
    """

    def __init__(self, weight_block_size: list[int], **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.weight_block_size = weight_block_size
        # Has transformers forget the quantization once the weights are loaded.
        self.dequantize = True


class BlockFp8Quantizer(HfQuantizer):
    """Has transformers dequantize while loading, one layer's tensors at a time."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Log that the model will not be in FP8.

        Args:
            *args: Unused.
            **kwargs: Unused.
        """
        rows, columns = self.quantization_config.weight_block_size
        logger.warning(f"FP8 weights in blocks of {rows} x {columns} are dequantized; quantization_config is dropped")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype to load in: bf16 where ``dtype="auto"`` found nothing but FP8.

        Args:
            dtype: What transformers settled on.
        """
        return torch.bfloat16 if dtype is not None and dtype.itemsize == 1 else dtype

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Return the model's conversions with dequantization as their first step, and one for all other weights.

        Args:
            weight_conversions: The model's own.
            model: Unused; transformers before 5.20 does not pass it.
        """
        updated = []
        for conversion in weight_conversions:
            if isinstance(conversion, WeightConverter):
                sources = [source.removesuffix("$") for source in conversion._original_source_patterns]
                conversion = WeightConverter(
                    source_patterns=[f"{source}{end}" for source in sources for end in ("$", "_scale_inv$")],
                    target_patterns=conversion._original_target_patterns,
                    operations=[DequantizeBlocks(self), *conversion.operations],
                )
            updated.append(conversion)
        general = WeightConverter(["weight$", "weight_scale_inv$"], "weight", [DequantizeBlocks(self)])
        return [*updated, general]

    def is_serializable(self) -> bool:
        """Return True: what is saved is not quantized."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: what is trained is not quantized."""
        return True


# Not by transformers' decorators, which raise where the package and a checkpoint's copy of it are both imported.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = BlockFp8Config
AUTO_QUANTIZER_MAPPING[METHOD] = BlockFp8Quantizer
