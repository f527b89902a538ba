"""The DeepSeek-style Mixture-of-Experts model for transformers.

Importing it registers model type ``deepseek_moe`` with the Auto classes, and the experts implementations ``fused_moe``
and ``fused_moe_fp8``.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_deepseek import DeepseekConfig
from .four_bit_experts import dequantize_experts, quantize_experts
from .four_bit_loading import FourBitExpertsConfig
from .fused_expert_parallel import computes_unused_slots  # noqa: F401  (importing it registers a way to split experts)
from .fused_experts import fused_moe_experts_forward  # noqa: F401  (importing it registers it)
from .fused_fp8 import fused_moe_fp8_experts_forward  # noqa: F401  (likewise)
from .modeling_deepseek import DeepseekForCausalLM, DeepseekForSequenceClassification, DeepseekModel

__all__ = [
    "DeepseekConfig",
    "DeepseekForCausalLM",
    "DeepseekForSequenceClassification",
    "DeepseekModel",
    "FourBitExpertsConfig",
    "dequantize_experts",
    "quantize_experts",
]

AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig)
DeepseekConfig.register_for_auto_class()
for _auto_class, _model_class in (
    (AutoModel, DeepseekModel),
    (AutoModelForCausalLM, DeepseekForCausalLM),
    (AutoModelForSequenceClassification, DeepseekForSequenceClassification),
):
    _auto_class.register(DeepseekConfig, _model_class)
    # Has save_pretrained copy these files beside the weights.
    _model_class.register_for_auto_class(_auto_class.__name__)
