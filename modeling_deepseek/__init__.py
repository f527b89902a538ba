"""The DeepSeek-style Mixture-of-Experts model for transformers.

Importing it registers model type ``deepseek_moe`` with the Auto classes, and the experts implementations ``fused_moe``
and ``fused_moe_fp8``.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
)

from .configuration_deepseek import DeepseekConfig
from .configuration_multimodal import DeepseekMultimodalConfig
from .four_bit_experts import dequantize_experts, quantize_experts
from .four_bit_loading import FourBitExpertsConfig
from .fused_expert_parallel import computes_unused_slots  # noqa: F401  (importing it registers a way to split experts)
from .fused_experts import fused_moe_experts_forward  # noqa: F401  (importing it registers it)
from .fused_fp8 import fused_moe_fp8_experts_forward  # noqa: F401  (likewise)
from .modeling_deepseek import DeepseekForCausalLM, DeepseekForSequenceClassification, DeepseekModel
from .modeling_multimodal import DeepseekMultimodalForConditionalGeneration, DeepseekMultimodalModel
from .processing_multimodal import AudioTextProcessor, ImageAudioTextProcessor, ImageTextProcessor

__all__ = [
    "DeepseekConfig",
    "DeepseekForCausalLM",
    "DeepseekForSequenceClassification",
    "DeepseekModel",
    "DeepseekMultimodalConfig",
    "DeepseekMultimodalForConditionalGeneration",
    "DeepseekMultimodalModel",
    "FourBitExpertsConfig",
    "dequantize_experts",
    "quantize_experts",
]

for _config_class in (DeepseekConfig, DeepseekMultimodalConfig):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    _config_class.register_for_auto_class()
for _auto_class, _config_class, _model_class in (
    (AutoModel, DeepseekConfig, DeepseekModel),
    (AutoModelForCausalLM, DeepseekConfig, DeepseekForCausalLM),
    (AutoModelForSequenceClassification, DeepseekConfig, DeepseekForSequenceClassification),
    (AutoModel, DeepseekMultimodalConfig, DeepseekMultimodalModel),
    (AutoModelForImageTextToText, DeepseekMultimodalConfig, DeepseekMultimodalForConditionalGeneration),
):
    _auto_class.register(_config_class, _model_class, exist_ok=True)
    # Has save_pretrained copy these files beside the weights.
    _model_class.register_for_auto_class(_auto_class.__name__)
AutoProcessor.register(DeepseekMultimodalConfig, ImageAudioTextProcessor)
for _processor_class in (ImageTextProcessor, AudioTextProcessor, ImageAudioTextProcessor):
    _processor_class.register_for_auto_class()
    AutoProcessor.register(_processor_class, _processor_class)  # found by name: one configuration has three of them
