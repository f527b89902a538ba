"""The released models that docs/finetune_any_moe.md fine-tunes, and what that is counted to take.

``dev/finetune_memory.py`` prints the count, ``whole_model_on_gpu.py`` measures it. Shapes only, on the meta device;
nothing is downloaded. Weights are what `quantize_experts` would store, the adapter is PEFT's own on such a model,
activations are `deepseek-moe plan`'s formula with every layer made again in the backward pass. A step takes most where
its backward pass begins, with nothing but the layers' inputs and the loss in memory, or in the last layer that the
backward pass makes again. Not counted: the allocator's rounding and fragmentation, and the CUDA context.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, PreTrainedConfig, Qwen3MoeConfig

from deepseek_kernels.four_bit import FourBitFormat
from deepseek_training.launch.cluster.layout import Layout
from deepseek_training.launch.cluster.memory import activation_bytes
from deepseek_training.launch.cluster.shape import ModelShape, read_shape

GIB = 2**30
TOKENS, RANK = 2048, 8
PARTS = ("experts", "the rest", "adapter", "layers' inputs", "loss or a layer")
# Per logit, in fp32, where the backward pass begins: the log-softmax that it kept, its gradient and the logits' one.
_LOSS_BYTES = 12
_ONE_SEQUENCE = Layout(data=1, batch=1, length=TOKENS)
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
# Both latent-attention models: DeepSeek-V2-Lite (arXiv 2405.04434, appendix B) and Moonlight (arXiv 2502.16982).
LATENT = {
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def released_models() -> dict[str, PreTrainedConfig]:
    """Return configurations by name, with the sizes of the models' own config.json."""
    return {
        "DeepSeek-V2-Lite": DeepseekV2Config(**LATENT, intermediate_size=10944, vocab_size=102400),
        "Moonlight-16B-A3B": DeepseekV3Config(**LATENT, intermediate_size=11264, vocab_size=163840),
        # arXiv 2505.09388, table 2.
        "Qwen3-30B-A3B": Qwen3MoeConfig(
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            vocab_size=151936,
            tie_word_embeddings=False,
        ),
    }


def weight_bytes(shape: ModelShape, model: torch.nn.Module) -> tuple[int, int]:
    """Return the bytes of the experts in NF4 and of everything else in bf16.

    Args:
        shape: Of the model.
        model: On the meta device.
    """
    fmt = FourBitFormat.of(4, "nf4", None)
    stacks = [tuple(p.shape) for name, p in model.named_parameters() if name.endswith(EXPERTS)]
    experts = sum(t.nbytes for stack in stacks for t in fmt.empty(stack, torch.bfloat16, "meta"))
    return experts, 2 * (shape.total - sum(layer.routed for layer in shape.layers))


def adapter_parameters(model: torch.nn.Module) -> int:
    """Return the parameters of an adapter on attention's output and experts.

    Args:
        model: On the meta device.
    """
    config = LoraConfig(r=RANK, target_modules=["o_proj"], target_parameters=list(EXPERTS))
    with torch.device("meta"):
        adapted = get_peft_model(model, config)
    return sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)


def input_bytes(shape: ModelShape) -> float:
    """Return the bytes of the layers' inputs that one sequence keeps.

    Args:
        shape: Of the model.
    """
    return TOKENS * sum(activation_bytes(shape, layer, _ONE_SEQUENCE, recompute="full") for layer in shape.layers)


def passing_bytes(shape: ModelShape, num_adapter: int) -> float:
    """Return the bytes of what comes and goes within a step: the loss, or one layer with all gradients.

    Args:
        shape: Of the model.
        num_adapter: Parameters of the adapter.
    """
    loss = TOKENS * _LOSS_BYTES * shape.vocabulary
    widest = max(activation_bytes(shape, layer, _ONE_SEQUENCE, recompute="none") for layer in shape.layers)
    # Gates and ups of all experts, in bf16 while they are multiplied.
    dense = 2 * shape.num_experts * 2 * shape.expert_width * shape.hidden
    return max(loss, TOKENS * widest + dense + 4 * num_adapter)


def count(config: PreTrainedConfig, name: str) -> tuple[int, list[float]]:
    """Return the parameters of a model and the bytes of each of `PARTS`.

    Args:
        config: Of the model.
        name: Of the model.
    """
    shape = read_shape(config, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = weight_bytes(shape, model)
    num_adapter = adapter_parameters(model)
    # The adapter and AdamW's two moments in fp32.
    return shape.total, [*weights, 12 * num_adapter, input_bytes(shape), passing_bytes(shape, num_adapter)]
