"""One tiny model of every experts class of the installed transformers, built from its default configuration.

`dev/moe_families.py` and the tests of families use it. Every size is made small by its name; `SETTINGS` holds what a
family needs beside that. A class of a later transformers is found by itself, and fails loudly if it cannot be built.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

MODELS = Path(transformers.__file__).parent / "models"
VOCABULARY = 97
NUM_EXPERTS = 8
# What may not be built: a vision tower of released size, for example.
MOST_PARAMETERS = 3_000_000
MOST_PARAMETERS_WITH_TOWERS = 20_000_000
# By a pattern of the setting's whole name, the first that fits.
SIZES: tuple[tuple[str, int], ...] = (
    (r"hidden_size|moe_hidden_size", 32),
    (r"moe_(intermediate|ffn_hidden)_size|expert_ffn_hidden_size|shared_experts?_intermediate_size", 24),
    (r".*(intermediate|ffn).*_size|n_inner", 40),
    (r".*vocab_size", VOCABULARY),
    (r"num_hidden_layers|n_layers?", 4),
    (r"linear_.*_heads|linear_num_heads", 2),
    (r"linear_.*head_dim", 8),
    (r".*num_attention_heads|n_heads|num_heads|.*key_value_heads|.*kv_heads", 4),
    (r"(global_|swa_|index_)?head_dim|(swa_)?v_head_dim|qk_(rope|nope)_head_dim", 8),
    (r"(kv|q|o)_lora_rank", 16),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts", NUM_EXPERTS),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|moe_top_k|top_k_experts|num_selected_experts|experts_per_token", 2),
    (r"n_group|topk_groups?|num_expert_group|num_groups?", 1),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"first_k_dense.*|num_dense_layers", 1),
    (r"(original_)?max_position_embeddings", 128),
    (r"index_topk", 8),
    (r"index_(n|num)_heads", 2),
    (r"sliding_window", 16),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r"depth|encoder_layers", 2),
    (r"d_model|out_hidden_size|output_dim", 32),
    (r"encoder_ffn_dim", 40),
    (r"downsample_hidden_size", 8),
    (r"encoder_attention_heads", 4),
)
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_ONE_DENSE = ["dense", "sparse", "sparse", "sparse"]
_HALF_LINEAR = ["linear_attention", "full_attention"] * 2
_GEMMA = {
    "enable_moe_block": True,
    "num_experts": NUM_EXPERTS,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "hidden_size_per_layer_input": 0,
}
# By folder of transformers/models: settings whose default leaves something out, or that must agree with a size.
SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HALF_LINEAR},
    "deepseek_ocr2": {"mlp_layer_types": _ONE_DENSE, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": _GEMMA,
    "dots3_note": {"per_layer_config": {}, "head_dim": 16},
    "dots1": {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [24, 24], "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "gemma4": {**_GEMMA, "vocab_size_per_layer_input": VOCABULARY},
    "glm4v_moe": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "glm5_next": {"index_topk": 16, "qk_rope_head_dim": 0},
    "granitemoehybrid": {
        "layer_types": _HALF_LINEAR, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    },
    "hunyuan_v1_moe": {"head_dim": 8},
    "hy_v4_vl": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HALF_LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {"head_dim": 16},
    "muse_spark": {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 24, "vision_start_token_id": 90},
    "qwen4_exp": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "hc_lowrank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# What sizes that do not fit one another raise upstream.
_WRONG_SIZES = (ValueError, TypeError, AttributeError, RuntimeError, StrictDataclassError)
_KINDS = ("ForCausalLM", "TextModel", "Model")


@cache
def find_experts_classes() -> tuple[tuple[str, str], ...]:
    """Module and class name of every class that transformers decorates as experts."""
    return tuple(_read_experts_classes())


def _read_experts_classes() -> Iterator[tuple[str, str]]:
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "@use_experts_implementation" not in source:
            continue
        for node in ast.parse(source).body:
            decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
            if isinstance(node, ast.ClassDef) and any("use_experts_implementation" in text for text in decorators):
                yield f"transformers.models.{path.parent.name}.{path.stem}", node.name


def build_tiny(module: str, name: str, seed: int = 0) -> PreTrainedModel:
    """Return a tiny model with that experts class in it, in fp32: a language model, or the text part of another.

    Args:
        module: From `find_experts_classes`.
        name: Likewise.
        seed: Of its weights.

    Raises:
        ValueError: No model class of the module could be built so; each is named with its reason.
    """
    return _first_built(module, name, seed, _model_classes(importlib.import_module(module), _KINDS), MOST_PARAMETERS)


def build_generating(module: str, name: str, seed: int = 0) -> PreTrainedModel:
    """Return a tiny model with that experts class in it that generates text, with its towers for images and sound.

    Args:
        module: From `find_experts_classes`.
        name: Likewise.
        seed: Of its weights.

    Raises:
        ValueError: No model class of the module generates and could be built; each is named with its reason.
    """
    classes = _model_classes(importlib.import_module(module), ("ForCausalLM", "ForConditionalGeneration"))
    generating = [cls for cls in classes if cls.can_generate()]
    return _first_built(module, name, seed, generating, MOST_PARAMETERS_WITH_TOWERS)


def _first_built(
    module: str, name: str, seed: int, classes: Sequence[type[PreTrainedModel]], most: int
) -> PreTrainedModel:
    reasons = []
    for model_class in classes:
        try:
            model = _build(model_class, module.split(".")[2], seed, most)
        except _WRONG_SIZES as error:
            reasons.append(f"{model_class.__name__}: {' '.join(str(error).split())}")
            continue
        if any(type(part).__name__ == name for part in model.modules()):
            return model
        reasons.append(f"{model_class.__name__}: has no {name}")
    raise ValueError(f"{name}: no tiny model ({'; '.join(reasons)}); add settings to SETTINGS")


def _model_classes(module: ModuleType, kinds: Sequence[str]) -> Sequence[type[PreTrainedModel]]:
    """Those of the module, language models first and of several modalities last."""

    def rank(cls: type[PreTrainedModel]) -> tuple[bool, int]:
        kind = next((number for number, kind in enumerate(kinds) if cls.__name__.endswith(kind)), len(kinds))
        return bool(cls.config_class.sub_configs), kind

    found = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__
    ]
    named = [
        cls for cls in found if cls.__name__.endswith(tuple(kinds)) and not cls.__name__.endswith("PreTrainedModel")
    ]
    return sorted((cls for cls in named if cls.config_class is not None), key=rank)


def _build(model_class: type[PreTrainedModel], family: str, seed: int, most: int) -> PreTrainedModel:
    config = model_class.config_class(**_sizes(model_class.config_class(), SETTINGS.get(family, {})))
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if num_parameters > most:
        raise ValueError(f"{num_parameters} parameters")
    torch.manual_seed(seed)
    return model_class(config).eval()


def _sizes(config: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that make a default configuration small, with those of its text part and towers."""
    own = config.to_dict()
    sizes: dict[str, Any] = {}
    for key, value in own.items():
        if isinstance(value, int) and not isinstance(value, bool):
            fitting = [size for pattern, size in SIZES if re.fullmatch(pattern, key)]
            if fitting:
                sizes[key] = fitting[0]
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    parts = {key: part for key, part in parts.items() if isinstance(part, PreTrainedConfig)}
    text = config.get_text_config()
    for key, part in parts.items():
        has_text = part.get_text_config() is text
        known = {name for name in settings if hasattr(text if has_text else part, name)}
        known -= set() if has_text else {name for name in settings if hasattr(text, name)}
        sizes[key] = _sizes(part, {name: settings[name] for name in known})
    return {**sizes, **{name: value for name, value in settings.items() if not parts or not hasattr(text, name)}}


def token_ids(rows: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Return tokens `[rows, length]`, none of them special."""
    return torch.randint(3, VOCABULARY - 8, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Return logits `[B, S, V]`; a model without a head is given its own embedding as one.

    Args:
        model: From `build_tiny`, wrapped or not.
        input_ids: `[B, S]`.
    """
    embedding = model.get_input_embeddings()
    is_given_embeddings = type(model).__name__.endswith("TalkerModel")  # by the model around it
    inputs = {"inputs_embeds": embedding(input_ids)} if is_given_embeddings else {"input_ids": input_ids}
    if type(model).__name__.startswith("Ernie4_5_VL"):  # every other token is one of an image, with its own experts
        inputs["moe_mm_token_type_ids"] = torch.arange(input_ids.shape[1]).expand_as(input_ids) % 2
    output = model(**inputs, use_cache=False)
    logits = getattr(output, "logits", None)
    return output.last_hidden_state @ embedding.weight.T if logits is None else logits


def loss_of(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the next token.

    Args:
        model: From `build_tiny`, wrapped or not.
        input_ids: `[B, S]`.
    """
    logits = logits_of(model, input_ids)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten())
