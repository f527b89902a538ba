"""A checkpoint as one GGUF file for llama.cpp, in its ``deepseek2`` architecture.

`deepseek-moe export --to gguf` calls it. It reads the safetensors files directly, ours or DeepSeek's own, one tensor
at a time, and writes names, shapes and settings as llama.cpp's loader wants them; what that graph cannot compute is
refused by name. Surprising: latent attention is stored absorbed (`attn_k_b` is the key half of ``kv_b_proj``,
transposed, so that scores are taken in the latent), and our attention over expert keys is linear in the token, so it
folds exactly into a plain gate.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from deepseek_records.json_files import read_object
from deepseek_records.loading import resolve_checkpoint
from deepseek_records.output_paths import check_output, make_output
from deepseek_serving.gguf_blocks import GROUP_SIZE
from deepseek_serving.gguf_tensors import Tensors, add_tensor, convert_tensors
from deepseek_serving.gguf_tokenizer import write_tokenizer
from modeling_deepseek import DeepseekConfig
from modeling_deepseek.packed_checkpoint import read_packed_settings

_GATING = {"softmax": "SOFTMAX", "sigmoid": "SIGMOID"}


def obstacles_to_gguf(config: dict[str, Any]) -> list[str]:
    """Return the settings that llama.cpp's ``deepseek2`` graph cannot compute, each as ``name=value``.

    A dynamic number of experts is not among them: `export_gguf` refuses it unless told a fixed number.

    Args:
        config: The configuration as in ``config.json``; keys of ours may be missing.
    """
    rope = config.get("rope_parameters") or {}
    wanted = {
        "norm_type": ("rmsnorm",),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "rope_interleave": (True,),
        "num_nextn_predict_layers": (0,),
        "topk_method": ("noaux_tc", "greedy"),
        "model_type": ("deepseek_moe", "deepseek_v3"),
    }
    found = [f"{key}={config[key]!r}" for key, allowed in wanted.items() if config.get(key, allowed[0]) not in allowed]
    if "model_type" not in config:
        found.append("no model_type")
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        found.append(f"rope_parameters={rope or config.get('rope_scaling')}")
    if config.get("num_hidden_layers") in (26, 27) and config.get("q_lora_rank"):
        # llama.cpp takes these for DeepSeek-V2-Lite, which has no query latent, and never reads its rank.
        found.append(f"num_hidden_layers={config['num_hidden_layers']} with q_lora_rank={config['q_lora_rank']}")
    quantization = config.get("quantization_config")
    if quantization is not None and q4_0_obstacle(quantization) is not None:
        found.append(f"quantization_config with {q4_0_obstacle(quantization)}")
    return found


def q4_0_obstacle(quantization: Any) -> str | None:
    """Return what in a quantized checkpoint's settings has no block type here; None where it is Q4_0.

    Args:
        quantization: As in ``config.json``.
    """
    settings = read_packed_settings(quantization)
    if settings is None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        return f"quant_method={method!r}"
    size = settings["group_size"]
    return None if size == GROUP_SIZE else f"group_size={size}, where Q4_0 has {GROUP_SIZE}"


def export_gguf(model_path: str | Path, output: str | Path, *, fixed_experts: int | None = None) -> Path:
    """Write a checkpoint as a GGUF file.

    Args:
        model_path: A folder with ``config.json``, ``*.safetensors`` and ``tokenizer.json``, in the official per-expert
            names.
        output: The file to write; it must not exist. A folder gets ``model.gguf``.
        fixed_experts: Export a model with a dynamic number of experts per token at this fixed number instead.

    Returns:
        The file. Weights keep their type (fp32, bf16, fp16, int4 in groups of 32 as Q4_0); norms and the router are
        fp32.

    Raises:
        ValueError: Something in the model that llama.cpp cannot compute; the message names it.
        FileExistsError: The file exists.
        FileNotFoundError: The folder is not a checkpoint.
    """
    gguf = _import_gguf()
    source = Path(resolve_checkpoint(model_path))
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"model: {source} holds no config.json; pass a checkpoint's folder")
    target = _target(Path(output))
    config = read_object(source / "config.json", "model")
    obstacles = obstacles_to_gguf(config)
    if obstacles:
        raise ValueError(f"model: {source} is outside what llama.cpp computes: {', '.join(obstacles)}")
    DeepseekConfig.from_pretrained(source)  # refuses values of a wrong type or size
    num_experts = _fixed_number(config, fixed_experts)
    tensors = Tensors.of(source)
    make_output(target.parent)
    # Written beside and renamed, so that a file of that name is always whole.
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, "deepseek2")
    write_settings(writer, config, num_experts)
    write_tokenizer(writer, source, config["vocab_size"])
    for name, tensor in convert_tensors(tensors, config):
        add_tensor(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)
    return target


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise ValueError("--to gguf: needs the package gguf; install it with: pip install gguf") from None
    return gguf


def _target(output: Path) -> Path:
    target = output if output.suffix == ".gguf" else output / "model.gguf"
    check_output(target.parent)
    if target.is_dir():
        raise IsADirectoryError(f"output: got the folder {target}, expected a file")
    if target.exists():
        raise FileExistsError(f"output: {target} exists")
    return target


def _fixed_number(config: dict[str, Any], fixed_experts: int | None) -> int:
    """The number of experts per token in the file, refusing to fix a dynamic one unasked."""
    most = config["num_experts_per_tok"]
    least = config.get("min_experts_per_tok") or most
    if fixed_experts is None:
        if least < most:
            raise ValueError(
                f"min_experts_per_tok={least} below num_experts_per_tok={most}: llama.cpp takes one fixed number of "
                "experts per token; pass it with --fixed-experts, and see the difference it makes"
            )
        return most
    if not 1 <= fixed_experts <= config["n_routed_experts"]:
        raise ValueError(
            f"--fixed-experts: {fixed_experts} is outside 1..n_routed_experts={config['n_routed_experts']}"
        )
    return fixed_experts


def write_settings(writer: Any, config: dict[str, Any], num_experts: int) -> None:
    """Write the ``deepseek2.*`` metadata.

    Args:
        writer: A `gguf.GGUFWriter`.
        config: The configuration as in ``config.json``.
        num_experts: Routed experts per token.
    """
    from gguf import ExpertGatingFuncType

    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)  # one latent that all heads share
    # Left out, it is guessed from the number of layers, and the loader fails.
    writer.add_q_lora_rank(config["q_lora_rank"] or 0)
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(num_experts)
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    # Left out, the file loads and its logits are wrong.
    writer.add_expert_gating_func(ExpertGatingFuncType[_GATING[config.get("scoring_func") or "sigmoid"]])
    if (config.get("n_group") or 1) > 1:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])


def _rope_theta(config: dict[str, Any]) -> float:
    rope = config.get("rope_parameters") or {}
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
